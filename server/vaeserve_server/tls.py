"""The server's certificate, its key, and whose certificates clients must have: read, and checked.

The transports refuse what is wrong with these files without a reason, or only when somebody connects; so OpenSSL, by
way of the standard library, checks them before, and an error says in one line what to do.
"""

from __future__ import annotations

import logging
import re
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vaeserve_server import x509
from vaeserve_server.errors import TlsError

_SOON = timedelta(days=7)
_CERTIFICATE, _KEY = b"-----BEGIN CERTIFICATE-----", b"PRIVATE KEY-----"
_BLOCK = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_ENCRYPTED = (b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """Which PEM files; `client_ca` None asks no client for a certificate."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def all(self) -> list[Path]:
        """Return every file there is."""
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]


@dataclass(frozen=True)
class Material:
    """What the files held, checked: PEM, the server certificate's number, and when the first one that expires does."""

    certificate_chain: bytes
    private_key: bytes = field(repr=False)
    client_ca: bytes | None
    serial: int
    not_after: datetime


class Tls:
    """The material in use. `load` it before anything else; a `load` that fails leaves what was there."""

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.material: Material

    def load(self) -> None:
        """Read and check the files, and log what will soon need somebody's care; TlsError if they are unusable."""
        self.material = read(self.files)
        fields = {"certificate": str(self.files.certificate), "not_after": f"{self.material.not_after:%Y-%m-%dT%H:%MZ}"}
        left = self.material.not_after - datetime.now(UTC)
        if left < timedelta(0):
            _log.error("a certificate has expired; clients that check it will not connect", extra={"fields": fields})
        elif left < _SOON:
            _log.warning("a certificate expires soon", extra={"fields": fields})
        else:
            _log.info("certificate", extra={"fields": fields})


def read(files: TlsFiles) -> Material:
    """Return what the files hold; TlsError naming the flag and the file if they cannot be served with."""
    chain = _pem("--tls-cert", files.certificate)
    key = _pem("--tls-key", files.key)
    _check_kinds(files, chain, key)
    _check_pair(files)
    facts = _facts("--tls-cert", files.certificate, chain)
    if not facts[0].key:
        raise TlsError(
            "--tls-cert", files.certificate, "its key is of a kind that gRPC does not take; use RSA or ECDSA P-256"
        )
    client_ca = _client_ca(files.client_ca)
    if (chain, key) != (_pem("--tls-cert", files.certificate), _pem("--tls-key", files.key)):
        raise TlsError("--tls-cert", files.certificate, "it or its key changed while it was read; try again")
    return Material(chain, key, client_ca, facts[0].serial, min(fact.not_after for fact in facts))


def _pem(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(flag, path, f"it cannot be read: {error.strerror}") from None


def _check_kinds(files: TlsFiles, chain: bytes, key: bytes) -> None:
    if _CERTIFICATE not in chain:
        swapped = "; are --tls-cert and --tls-key swapped?" if _KEY in chain else " (PEM)"
        raise TlsError("--tls-cert", files.certificate, f"it holds no certificate{swapped}")
    if _KEY not in key:
        raise TlsError("--tls-key", files.key, "it holds no private key (PEM)")
    if any(mark in key for mark in _ENCRYPTED):
        raise TlsError(
            "--tls-key",
            files.key,
            "the key is encrypted, and the server has nobody to ask for the passphrase; write it out with `openssl "
            "pkey -in KEY -out PLAIN`, for the server alone to read",
        )


def _check_pair(files: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(
                "--tls-key",
                files.key,
                f"it is not the key of the first certificate in {files.certificate}; the server's own comes first, "
                "then those that vouch for it",
            ) from None
        raise TlsError(
            "--tls-cert", files.certificate, f"OpenSSL takes neither it nor {files.key}: {_reason(error)}"
        ) from None
    except OSError as error:
        raise TlsError("--tls-cert", files.certificate, f"it or its key cannot be read: {error.strerror}") from None


def _client_ca(path: Path | None) -> bytes | None:
    if path is None:
        return None
    pem = _pem("--client-ca", path)
    if _CERTIFICATE not in pem:
        raise TlsError("--client-ca", path, "it holds no certificate (PEM)")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise TlsError("--client-ca", path, f"OpenSSL does not take it: {_reason(error)}") from None
    fields = {"client_ca": str(path)}
    if all(fact.not_after < datetime.now(UTC) for fact in _facts("--client-ca", path, pem)):
        _log.error("the certificates that vouch for clients have expired; none can connect", extra={"fields": fields})
    return pem


def _facts(flag: str, path: Path, pem: bytes) -> list[x509.Facts]:
    """Return the facts of every certificate in a file, in order."""
    try:
        return [x509.read(ssl.PEM_cert_to_DER_cert(block)) for block in _BLOCK.findall(pem.decode("ascii", "replace"))]
    except ValueError as error:
        raise TlsError(flag, path, f"one of its certificates is damaged: {error}") from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")
