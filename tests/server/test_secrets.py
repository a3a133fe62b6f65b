"""No secret comes out where nobody expects one: logs, errors, metrics, traces, arguments, variables, Envoy's own pages.

Everything that a server shows while it is called with good and bad tokens, over mutual TLS, is gathered and searched
for the tokens, their hashes and the private key, as they are and in base64 and hexadecimal.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from certificates import Authority
from processes import ENVIRONMENT
from vaeserve import TLS, Client, VaeserveError
from vaeserve_server import tokens
from vaeserve_server.tokens import TokenFile

GUESSED = tokens.PREFIX + "a-guess-that-somebody-made-0123456789"
_EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"
_ENVOY_PAGES = (
    "config_dump?include_eds",
    "certs",
    "stats",
    "listeners",
    "clusters",
    "server_info",
    "runtime",
    "memory",
)


class Collector:
    """Takes what OpenTelemetry exports, as bytes. `target` is where."""

    def __init__(self) -> None:
        self.received = b""

        def take(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.received += request
            return b""

        handler = {"Export": grpc.unary_unary_rpc_method_handler(take)}
        self._server = grpc.server(ThreadPoolExecutor())
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_EXPORT, handler)])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.stop()


def forms(secret: bytes) -> list[bytes]:
    """Return how a secret may look in a dump; base64 at each of its three alignments, without the ends that vary."""
    shifted = [base64.b64encode(b"x" * shift + secret)[4:-4] for shift in range(3)]
    return [secret, secret.hex().encode(), *shifted]


def found(secrets: dict[str, bytes], gathered: dict[str, bytes]) -> list[str]:
    return [
        f"{name} in {where}"
        for where, content in gathered.items()
        for name, secret in secrets.items()
        if any(form in content for form in forms(secret))
    ]


def errors_told(target: str, tls: TLS) -> bytes:
    """Call with a wrong token, with one for other RPCs, and with one that is broken; return all that was said."""
    said = []
    for token in (GUESSED, "two words"):
        try:
            with Client(target, tls=tls, token=token, max_attempts=1) as client:
                client.models()
        except VaeserveError as error:
            said.append(f"{error!r} {error.__dict__}")
    return " ".join(said).encode()


def envoy_pages(folder: Path) -> dict[str, bytes]:
    pages = {}
    for page in _ENVOY_PAGES:
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.connect(str(folder / "admin.sock"))
        connection.request("GET", f"/{page}")
        pages[f"Envoy's {page}"] = connection.getresponse().read()
        connection.close()
    assert b"http_connection_manager" in pages[f"Envoy's {_ENVOY_PAGES[0]}"]
    return pages


def files_of(folder: Path) -> dict[str, bytes]:
    """Return what stands in a server's own files; links lead to the user's."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def test_the_search_finds_what_it_is_to_find() -> None:
    secrets = {"token": GUESSED.encode()}
    for form in (GUESSED.encode(), GUESSED.encode().hex().encode(), base64.b64encode(b"{" + GUESSED.encode() + b"}")):
        assert found(secrets, {"here": b"before " + form + b" after"}) == ["token in here"]
    assert found(secrets, {"here": b"nothing"}) == []


@pytest.mark.parametrize("transport", ["grpc", "envoy"])
def test_no_secret_is_to_be_found_in_what_a_server_shows(several_models: Path, tmp_path: Path, transport: str) -> None:
    if transport == "envoy":
        pytest.importorskip("pyvoy")
    authority = Authority(tmp_path)
    certificate, key = authority.issue()
    client_certificate, client_key = authority.issue("client")
    secret, token = tokens.make("reader", ("ListModels",), None)
    (tmp_path / "tokens.json").write_text(TokenFile(tokens=(token,)).model_dump_json(exclude_none=True))
    own = tmp_path / "own"
    own.mkdir()
    flags = [
        *("--models", str(several_models), "--device", "cpu", "--port", "0", "--transport", transport),
        *("--tls-cert", str(certificate), "--tls-key", str(key), "--client-ca", str(authority.file)),
        *("--tokens", str(tmp_path / "tokens.json"), "--log-level", "debug", "--log-format", "json", "--traces"),
    ]
    tls = TLS(authority.file, client_key, client_certificate)
    gathered: dict[str, bytes] = {}
    with collecting() as collector, (tmp_path / "log").open("w+") as log:
        variables = {"TMPDIR": str(own), "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.target}"}
        with subprocess.Popen(
            [sys.executable, "-m", "vaeserve_server", *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=ENVIRONMENT | variables,
        ) as popen:
            try:
                assert popen.stdout is not None
                target = popen.stdout.readline().split(" on ")[1].split(" ")[0]
                with Client(target, tls=tls, token=secret) as client:
                    assert client.models()
                    with pytest.raises(VaeserveError) as denied:
                        client.sample(1)
                gathered["the error of an RPC not allowed"] = repr(vars(denied.value)).encode()
                gathered["the errors of wrong tokens"] = errors_told(target, tls)
                for name in ("cmdline", "environ", "status"):
                    gathered[f"/proc/PID/{name}"] = Path(f"/proc/{popen.pid}/{name}").read_bytes()
                if transport == "envoy":
                    (folder,) = own.glob("vaeserve-*")
                    gathered |= envoy_pages(folder)
                gathered |= files_of(own)
                said = (tmp_path / "log").read_text()
                url = said.partition('"url": "')[2].partition('"')[0]
                with urllib.request.urlopen(url, timeout=10) as page:
                    gathered["the metrics"] = page.read()
                popen.terminate()
                assert popen.wait(30) == 0
            finally:
                popen.kill()
        gathered["the log"] = (tmp_path / "log").read_bytes()
        gathered["the traces"] = collector.received

    key_lines = key.read_text().splitlines()
    secrets = {
        "the token": secret.removeprefix(tokens.PREFIX).encode(),
        "the guessed token": GUESSED.removeprefix(tokens.PREFIX).encode(),
        "the token's hash": token.hash.rpartition("$")[2].encode(),
        "the private key": key_lines[len(key_lines) // 2].encode(),
    }
    assert found(secrets, gathered) == []
    # It would have been seen: each place has what was to be there.
    for where, expected in {
        "the log": b'"caller": "reader"',
        "the metrics": b'code="UNAUTHENTICATED"',
        "the traces": b"vaeserve.v1.VaeService/ListModels",
        "the errors of wrong tokens": b"no valid token came with the call",
        "/proc/PID/cmdline": os.fsencode("vaeserve"),
    }.items():
        assert expected in gathered[where], where
