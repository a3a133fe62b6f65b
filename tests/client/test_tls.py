"""Encrypted connections: whom the client trusts, and how it shows who it is."""

from pathlib import Path

import grpc
import numpy as np
import pytest

from both_clients import both_clients
from faulty_server import IMAGE_SHAPE, faulty_server
from vaeserve import TLS, InvalidArgument, Unavailable

FILES = Path(__file__).parent / "tls"
CERTIFICATE, KEY = FILES / "certificate.pem", FILES / "key.pem"
IMAGES = np.zeros((2, *IMAGE_SHAPE), np.uint8)


@pytest.fixture(params=[False, True], ids=["server-only", "mutual"])
def mutual(request):
    return request.param


@pytest.fixture
def server(mutual):
    credentials = grpc.ssl_server_credentials(
        [(KEY.read_bytes(), CERTIFICATE.read_bytes())],
        root_certificates=CERTIFICATE.read_bytes() if mutual else None,
        require_client_auth=mutual,
    )
    with faulty_server(credentials=credentials) as running:
        yield running


@both_clients
def test_files_or_bytes_make_a_connection(server, connect, mutual):
    own = {"private_key": KEY, "certificate_chain": CERTIFICATE.read_bytes()} if mutual else {}
    tls = TLS(root_certificates=str(CERTIFICATE), server_name="vaeserve.test", **own)
    with connect(server.target, tls=tls) as client:
        assert len(client.encode(IMAGES)) == 2
        assert client.healthy()


@both_clients
@pytest.mark.parametrize(
    "tls",
    [False, True, TLS(root_certificates=CERTIFICATE)],
    ids=["plain", "authority not trusted", "name does not match"],
)
def test_what_does_not_match_is_told_as_tls(server, connect, tls):
    with (
        connect(server.target, tls=tls, max_attempts=1) as client,
        pytest.raises(Unavailable, match="both sides use TLS or neither does"),
    ):
        client.encode(IMAGES)


def test_a_key_needs_its_certificate():
    with pytest.raises(InvalidArgument, match="give both or neither"):
        TLS(private_key=KEY)


@both_clients
def test_a_missing_file_is_named(connect, tmp_path):
    tls = TLS(root_certificates=tmp_path / "ca.pem")
    with pytest.raises(FileNotFoundError, match=r"ca\.pem"), connect("x:1", tls=tls) as client:
        client.healthy()
