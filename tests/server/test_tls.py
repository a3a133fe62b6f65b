"""Encrypted connections on both transports: who gets one, renewed certificates, and what is said of wrong files."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography import x509 as reference
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from certificates import Authority
from serving import running_server
from vaeserve import TLS, Client, Unavailable
from vaeserve_server import renewal, x509
from vaeserve_server.errors import StartError, TlsError
from vaeserve_server.tls import Tls, TlsFiles, read

_LIMIT_S = 30.0


@pytest.fixture(params=["grpc", "envoy"])
def transport(request: pytest.FixtureRequest) -> str:
    if request.param == "envoy":
        pytest.importorskip("pyvoy")
    return str(request.param)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The log of this process, in which files are looked at more often than a server does."""
    monkeypatch.setattr(renewal, "POLL_S", 0.05)
    caplog.set_level("INFO", "vaeserve_server")
    return caplog


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def answers(target: str, tls: TLS | bool) -> bool:
    with Client(target, tls=tls, max_attempts=1, timeout_s=_LIMIT_S) as client:
        try:
            return bool(client.models())
        except Unavailable:
            return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.05)


def shown_certificate(target: str) -> int:
    """Return the number of the certificate that a new connection is shown."""
    host, port = target.split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), _LIMIT_S) as plain, context.wrap_socket(plain) as encrypted:
        assert encrypted.selected_alpn_protocol() == "h2"
        certificate = encrypted.getpeercert(binary_form=True)
    assert certificate is not None
    return x509.read(certificate).serial


def serial(certificate: Path) -> int:
    return reference.load_pem_x509_certificate(certificate.read_bytes()).serial_number


def test_only_who_trusts_the_authority_and_encrypts_is_answered(
    several_models: Path, authority: Authority, tmp_path: Path, transport: str
) -> None:
    certificate, key = authority.issue()
    stranger = Authority(tmp_path, "stranger")
    with running_server(several_models, transport=transport, tls_cert=certificate, tls_key=key) as server:
        assert answers(server.target, TLS(authority.file))
        assert not answers(server.target, TLS(stranger.file))
        assert not answers(server.target, tls=False)
        assert answers(server.target, TLS(authority.file))


def test_with_client_ca_only_its_clients_are_answered(
    several_models: Path, authority: Authority, tmp_path: Path, transport: str
) -> None:
    certificate, key = authority.issue()
    clients, strangers = Authority(tmp_path, "clients"), Authority(tmp_path, "strangers")
    own, own_key = clients.issue("client")
    false, false_key = strangers.issue("false")
    tls = {"tls_cert": certificate, "tls_key": key, "client_ca": clients.file}
    with running_server(several_models, transport=transport, **tls) as server:
        assert answers(server.target, TLS(authority.file, own_key, own))
        assert not answers(server.target, TLS(authority.file))
        assert not answers(server.target, TLS(authority.file, false_key, false))
        clients.file.write_bytes(strangers.file.read_bytes())
        until(lambda: answers(server.target, TLS(authority.file, false_key, false)))
        assert not answers(server.target, TLS(authority.file, own_key, own))


def test_a_renewed_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    several_models: Path, authority: Authority, transport: str, log: pytest.LogCaptureFixture
) -> None:
    certificate, key = authority.issue()
    with (
        running_server(several_models, transport=transport, tls_cert=certificate, tls_key=key) as server,
        Client(server.target, tls=TLS(authority.file), max_attempts=1) as client,
    ):
        assert client.models()
        first = serial(certificate)
        assert shown_certificate(server.target) == first
        key_before = key.read_bytes()
        authority.issue()
        until(lambda: shown_certificate(server.target) == serial(certificate) != first)
        assert client.models()
        good = serial(certificate)
        key.write_bytes(key_before)  # of another certificate
        until(lambda: "keeping the old" in (log.text if transport == "grpc" else server.log()))
        assert shown_certificate(server.target) == good
        authority.issue()
        until(lambda: shown_certificate(server.target) == serial(certificate) != good)


def test_a_wrong_file_ends_the_start_with_its_name(several_models: Path, authority: Authority, transport: str) -> None:
    certificate, _ = authority.issue()
    _, other_key = authority.issue("other")
    words = re.escape(f"--tls-key {other_key}: it is not the key of the first certificate in {certificate}")
    with (
        pytest.raises(StartError, match=words),
        running_server(several_models, transport=transport, tls_cert=certificate, tls_key=other_key),
    ):
        pass


def write_key(path: Path, key: Any, passphrase: bytes | None = None) -> Path:
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    return path


def self_signed(folder: Path, key: Any) -> TlsFiles:
    name = reference.Name([reference.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    certificate = (
        reference.CertificateBuilder(name, name, key.public_key(), 7, now, now + timedelta(days=1))
        .sign(key, algorithm)
        .public_bytes(serialization.Encoding.PEM)
    )
    (folder / "self.crt").write_bytes(certificate)
    return TlsFiles(folder / "self.crt", write_key(folder / "self.key", key))


def test_each_thing_that_can_be_wrong_is_told(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue()
    nothing, folder, empty, broken = tmp_path / "nothing", tmp_path / "folder", tmp_path / "empty", tmp_path / "broken"
    folder.mkdir()
    empty.touch()
    broken.write_text(certificate.read_text().replace("M", "m", 5))
    encrypted = write_key(tmp_path / "encrypted.key", ec.generate_private_key(ec.SECP256R1()), b"secret")
    edwards = self_signed(tmp_path, ed25519.Ed25519PrivateKey.generate())
    told = {
        (certificate, nothing, None): f"--tls-key {nothing}: it cannot be read: No such file or directory",
        (nothing, key, None): f"--tls-cert {nothing}: it cannot be read: No such file or directory",
        (folder, key, None): f"--tls-cert {folder}: it cannot be read: Is a directory",
        (empty, key, None): f"--tls-cert {empty}: it holds no certificate (PEM)",
        (key, certificate, None): f"--tls-cert {key}: it holds no certificate; are --tls-cert and --tls-key swapped?",
        (certificate, empty, None): f"--tls-key {empty}: it holds no private key (PEM)",
        (
            certificate,
            encrypted,
            None,
        ): f"--tls-key {encrypted}: the key is encrypted, and the server has",
        (broken, key, None): f"--tls-cert {broken}: OpenSSL takes neither it nor {key}: ",
        (certificate, key, nothing): f"--client-ca {nothing}: it cannot be read: No such file or directory",
        (certificate, key, key): f"--client-ca {key}: it holds no certificate (PEM)",
        (certificate, key, broken): f"--client-ca {broken}: OpenSSL does not take it: ",
        (
            edwards.certificate,
            edwards.key,
            None,
        ): "its key is of a kind that gRPC does not take; use RSA or ECDSA",
    }
    for files, words in told.items():
        with pytest.raises(TlsError, match=re.escape(words)) as raised:
            read(TlsFiles(*files))
        assert "\n" not in str(raised.value)
        assert "BEGIN" not in str(raised.value)


@pytest.mark.parametrize(
    ("days", "words"),
    [(-1.0, "a certificate has expired; "), (2.0, "a certificate expires soon"), (60.0, "certificate")],
)
def test_a_certificate_near_its_end_is_told(
    authority: Authority, days: float, words: str, log: pytest.LogCaptureFixture
) -> None:
    Tls(TlsFiles(*authority.issue(days=days))).load()
    (message,) = log.messages
    assert message.startswith(words)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (rsa.generate_private_key(65537, 2048), "RSA"),
        (ec.generate_private_key(ec.SECP256R1()), "ECDSA P-256"),
        (ec.generate_private_key(ec.SECP384R1()), "ECDSA P-384"),
        (ec.generate_private_key(ec.SECP256K1()), ""),
        (ed25519.Ed25519PrivateKey.generate(), ""),
    ],
)
def test_facts_are_those_of_a_whole_parser(key: Any, kind: str, tmp_path: Path) -> None:
    pem = self_signed(tmp_path, key).certificate.read_text()
    expected = reference.load_pem_x509_certificate(pem.encode())
    facts = x509.read(ssl.PEM_cert_to_DER_cert(pem))
    assert facts == (expected.serial_number, expected.not_valid_before_utc, expected.not_valid_after_utc, kind)


def test_years_of_both_centuries_are_told_apart() -> None:
    far = trustme.CA().issue_cert("test", not_before=datetime(1999, 5, 1), not_after=datetime(2060, 5, 1))
    facts = x509.read(ssl.PEM_cert_to_DER_cert(far.cert_chain_pems[0].bytes().decode()))
    assert (facts.not_before.year, facts.not_after.year) == (1999, 2060)


def test_what_is_no_certificate_is_refused(authority: Authority) -> None:
    certificate, _ = authority.issue()
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text())
    for length in range(0, 200, 7):
        with pytest.raises(ValueError):
            x509.read(der[:length])


def test_a_private_key_is_never_shown(authority: Authority) -> None:
    certificate, key = authority.issue()
    assert "PRIVATE" not in repr(read(TlsFiles(certificate, key)))


def test_a_plain_port_is_not_taken_for_an_encrypted_one(several_models: Path, authority: Authority) -> None:
    with running_server(several_models) as server:
        assert not answers(server.target, TLS(authority.file))
        with grpc.insecure_channel(server.target) as channel:
            grpc.channel_ready_future(channel).result(_LIMIT_S)
