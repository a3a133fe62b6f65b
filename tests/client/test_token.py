"""Where the SDK takes its token from, and over which connections it lets it go."""

from __future__ import annotations

import numpy as np
import pytest

from both_clients import both_clients
from faulty_server import IMAGE_SHAPE, faulty_server
from vaeserve import TLS, Client, InvalidArgument
from vaeserve._settings import is_local
from vaeserve.cli import main

IMAGES = np.zeros((1, *IMAGE_SHAPE), np.uint8)


@pytest.fixture
def server():
    with faulty_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _no_token_of_the_machine(monkeypatch):
    monkeypatch.delenv("VAESERVE_TOKEN", raising=False)
    monkeypatch.delenv("VAESERVE_TOKEN_FILE", raising=False)


def shown(server, connect, **settings):
    """Return what a call shows as authorization."""
    server.service.asked.clear()
    with connect(server.target, **settings) as client:
        client.models()
    (asked,) = server.service.asked
    return asked.metadata.get("authorization")


@both_clients
def test_the_token_is_what_is_given_else_the_environments(server, connect, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("in-a-file\n")
    assert shown(server, connect) is None
    monkeypatch.setenv("VAESERVE_TOKEN_FILE", str(file))
    assert shown(server, connect) == "Bearer in-a-file"
    monkeypatch.setenv("VAESERVE_TOKEN", "in-the-environment")
    assert shown(server, connect) == "Bearer in-the-environment"
    assert shown(server, connect, token=file) == "Bearer in-a-file"
    assert shown(server, connect, token="given") == "Bearer given"
    assert shown(server, connect, token="") is None


@both_clients
def test_a_file_that_changes_is_read_again_and_one_that_breaks_is_not(server, connect, tmp_path):
    file = tmp_path / "token"
    file.write_text("first")
    with connect(server.target, token=file) as client:
        for content, expected in {"second": "second", "two words": "second", None: "second", "third": "third"}.items():
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_text(content)
            client.models()
            assert server.service.asked[-1].metadata["authorization"] == f"Bearer {expected}"


@both_clients
def test_no_token_crosses_a_network_unencrypted(connect, monkeypatch):
    words = "would cross the network to far.example:50051 unencrypted; give tls, or insecure"
    with pytest.raises(InvalidArgument, match=words) as raised:
        connect("far.example:50051", token="hidden-one")
    assert "hidden-one" not in str(raised.value)
    monkeypatch.setenv("VAESERVE_TOKEN", "hidden-one")
    with pytest.raises(InvalidArgument, match=rf"the token \(VAESERVE_TOKEN\) {words}"):
        connect("far.example:50051")
    for settings in ({"tls": True}, {"tls": TLS()}, {"insecure": True}, {"token": ""}):
        with connect("far.example:50051", **settings) as client:
            assert "hidden-one" not in repr(client)


@both_clients
@pytest.mark.parametrize("token", ["two words", "line\nbreak", "ümlaut", "\x00zero", " "])
def test_what_no_header_may_carry_is_refused_and_not_repeated(connect, token):
    with pytest.raises(InvalidArgument, match="is empty, or not one word of printable ASCII") as raised:
        connect("127.0.0.1:1", token=token)
    assert token not in str(raised.value).replace(" ", "") or token == " "


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.0.0.1", True),
        ("localhost:50051", True),
        ("dns:///localhost:50051", True),
        ("dns:localhost:50051", True),
        ("[::1]:50051", True),
        ("unix:/run/vaeserve.sock", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", True),
        ("ipv6:[::1]:1", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("127.far.example:50051", False),
        ("localhost.far.example:1", False),
        ("10.0.0.1:50051", False),
        ("[2001:db8::1]:50051", False),
        ("dns:///far.example:1", False),
        ("xds:///localhost", False),
    ],
)
def test_which_targets_are_on_this_machine(target, local):
    assert is_local(target) is local


def test_the_command_line_takes_the_same(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VAESERVE_TOKEN", "in-the-environment")
    assert main(["health", "--target", server.target]) == 0
    assert main(["info", "--target", "far.example:1"]) == 1
    told = capsys.readouterr().err
    assert "the token (VAESERVE_TOKEN) would cross the network to far.example:1 unencrypted" in told
    assert "in-the-environment" not in told


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-token"):
        Client("127.0.0.1:1", token=tmp_path / "no-token")
