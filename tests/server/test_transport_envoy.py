"""What only the server behind Envoy has: its own gRPC over ASGI's events, Envoy's life, and the ways both can end."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from h2.errors import ErrorCodes

import metrics_page
from bundles import ENCODER, slow_encoder, write_bundle
from certificates import Authority
from http2 import Connection, frame
from vaeserve import TLS, Client, tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings

pytest.importorskip("pyvoy", reason='the server behind Envoy is an extra; pip install "vaeserve[envoy]"')

from envoy_serving import EnvoyServer, spawn
from serving import queued_rows
from vaeserve_server import addresses, envoy

Stub = vae_pb2_grpc.VaeServiceStub
ENCODE, LIST_MODELS = "/vaeserve.v1.VaeService/Encode", "/vaeserve.v1.VaeService/ListModels"
CHECK = "/grpc.health.v1.Health/Check"
IMAGE, LATENT = (1, 4, 4), (3,)
MUCH_TOO_LONG = 1.0
A_SECOND = 0.02
Check = health_pb2.HealthCheckRequest
Answer = health_pb2.HealthCheckResponse


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose encoder takes a minute times the brightest pixel."""
    folder = tmp_path_factory.mktemp("models")
    write_bundle(folder, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: slow_encoder(IMAGE, LATENT)})
    return folder


def settings(models: Path, **changes: object) -> Settings:
    chosen = {
        "models": models,
        "port": 0,
        "metrics_port": 0,
        "device": "cpu",
        "transport": "envoy",
        "threads": 1,
        "drain_s": 0.0,
        **changes,
    }
    return Settings.model_validate(chosen)


@contextlib.contextmanager
def envoy_server(models: Path, temporary: Path | None = None, **changes: object) -> Iterator[EnvoyServer]:
    server = EnvoyServer(settings(models, **changes), **({"TMPDIR": str(temporary)} if temporary else {}))
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[EnvoyServer]:
    with envoy_server(models, max_message_bytes=2**20) as running:
        yield running


@pytest.fixture
def busy_server(models: Path) -> Iterator[EnvoyServer]:
    """A server for a test that gives it too much to do."""
    with envoy_server(models) as running:
        yield running


def request(pixel: float) -> bytes:
    images = np.full((1, *IMAGE), pixel, np.float32)
    return frame(pb.EncodeRequest(images=tensors.to_tensor(images)).SerializeToString())


def occupy(server: EnvoyServer, connection: Connection) -> int:
    """Start a run that outlasts the test; return its stream when the only thread has it."""
    stream = connection.open(ENCODE)
    connection.send(stream, request(MUCH_TOO_LONG))
    server.until(lambda state: state.models.pool._free == 0)
    return stream


@pytest.mark.parametrize(
    ("body", "headers", "outcome", "message"),
    [
        (frame(b""), {"content_type": "application/json"}, "415", ""),
        (frame(b""), {"content_type": "application/grpc-web"}, "415", ""),
        (frame(b""), {"content_type": "application/grpc+proto"}, "0", ""),
        (frame(b""), {"te": ""}, "13", "the request lacks the header `te: trailers`"),
        (b"", {}, "13", "the request has no message; the method takes one"),
        (frame(b"") * 2, {}, "13", "the request has more than one message; the method takes one"),
        (frame(b"")[:3], {}, "13", "the request ended after 3 of the 5 bytes of a message"),
        (frame(b"", length=2**32 - 1), {}, "8", "Received message larger than max (4294967295 vs. 1048576)"),
        (frame(b"\x0a\0", 1), {"grpc_encoding": "gzip"}, "3", "a message is not gzip data, as its call says"),
        (frame(b"", compressed=2), {}, "13", "a message's first byte is 2; it says compressed (1) or not (0)"),
    ],
)
def test_what_breaks_the_protocol_is_told_so(
    server: EnvoyServer, body: bytes, headers: dict[str, str], outcome: str, message: str
) -> None:
    with Connection(server.target) as connection:
        assert connection.call(LIST_MODELS, body, **headers) == outcome
        assert connection.headers[1].get("grpc-message", "") == message
        assert connection.call(LIST_MODELS, frame(b"")) == "0"
    server.until(lambda state: state.streams == 0)


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/%FF", "POST"),
        ("/%ED%A0%80", "POST"),
        ("/grpc.%FF", "POST"),
        (f"{LIST_MODELS}?a", "POST"),
        (LIST_MODELS, "GET"),
    ],
)
def test_what_is_no_method_never_comes_to_pyvoy(server: EnvoyServer, path: str, method: str) -> None:
    with Connection(server.target) as connection:
        assert connection.call(path, frame(b""), method=method) == "12"
        assert connection.headers[1]["grpc-message"] == "Method not found!"
        assert connection.call(LIST_MODELS, frame(b"")) == "0"
    assert "Traceback" not in server.log()


def test_a_giant_claim_is_refused_before_its_bytes_come(server: EnvoyServer) -> None:
    with Connection(server.target) as connection:
        stream = connection.open(ENCODE)
        connection.send(stream, frame(b"the first bytes", length=2**32 - 1), end=False)
        assert connection.outcome(stream) == "8"


def test_a_message_in_crumbs_is_put_together(server: EnvoyServer) -> None:
    with Connection(server.target) as connection:
        stream = connection.open(ENCODE)
        body = request(0.0)
        for position in range(len(body)):
            connection.send(stream, body[position : position + 1], end=position == len(body) - 1)
        assert connection.outcome(stream) == "0"


def test_requests_without_an_end_give_their_places_back_when_many_are_taken(models: Path) -> None:
    with envoy_server(models, max_calls=8) as server, Connection(server.target) as connection:
        health = [connection.open(CHECK) for _ in range(8)]  # which have no part in the limit
        streams = [connection.open(ENCODE) for _ in range(8)]
        for stream in (*health, *streams):
            connection.send(stream, request(0.0)[:1], end=False)
        assert [connection.outcome(stream) for stream in streams[:6]] == ["8"] * 6
        told = connection.headers[streams[0]]
        assert told["grpc-message"].startswith("the request did not come to its end while the server had 8 calls")
        assert 100 <= int(told["grpc-retry-pushback-ms"]) <= 200
        assert connection.call(LIST_MODELS, frame(b"")) == "0"
        assert not connection.ended.keys() & {*health}
        assert metrics_page.scrape(server)("vaeserve_refused_total", rpc="Encode") >= 6


def test_while_there_is_room_a_request_may_take_its_time(models: Path) -> None:
    with envoy_server(models, max_calls=8) as server, Connection(server.target) as connection:
        slow = [connection.open(ENCODE) for _ in range(4)]
        assert connection.outcome(connection.open(ENCODE, grpc_timeout="1500m")) == "4"  # by the server's clock
        for stream in slow:
            connection.send(stream, request(0.0))
            assert connection.outcome(stream) == "0"


def test_the_server_keeps_the_deadline_that_its_client_does_not(busy_server: EnvoyServer) -> None:
    with Connection(busy_server.target) as connection:
        slow = occupy(busy_server, connection)
        waiting = connection.open(ENCODE, grpc_timeout="50m")
        connection.send(waiting, request(0.0))
        unsent = connection.open(ENCODE, grpc_timeout="50m")  # whose message never comes
        assert connection.outcome(waiting) == "4"
        assert connection.outcome(unsent) == "4"
        busy_server.until(lambda state: queued_rows(state) == 0)
        assert slow not in connection.ended


def test_a_reset_takes_its_own_call_out_of_the_queue_and_no_other(busy_server: EnvoyServer) -> None:
    with Connection(busy_server.target) as connection:
        occupy(busy_server, connection)
        streams = [connection.open(ENCODE, x_vaeserve_stream="the caller's own") for _ in range(3)]
        for stream in streams:
            connection.send(stream, request(0.0))
        busy_server.until(lambda state: queued_rows(state) == 3)
        connection.http.reset_stream(streams[1], ErrorCodes.CANCEL)
        connection.flush()
        busy_server.until(lambda state: queued_rows(state) == 2)
        assert connection.ended == {}


def test_a_client_that_leaves_in_the_middle_of_its_message_is_forgotten(server: EnvoyServer) -> None:
    with Connection(server.target) as connection:
        stream = connection.open(ENCODE)
        connection.send(stream, request(0.0)[:-1], end=False)
        server.until(lambda state: state.streams == 1)
    server.until(lambda state: state.streams == 0)


def test_watchers_that_leave_are_forgotten(server: EnvoyServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        streams = [watch(Check()) for _ in range(5)]
        assert {next(stream).status for stream in streams} == {Answer.SERVING}
        server.until(lambda state: state.streams == 5)
        streams[0].cancel()
        server.until(lambda state: state.streams == 4)
    server.until(lambda state: state.streams == 0)


def test_watchers_that_leave_while_they_are_answered_leave_no_complaint(models: Path) -> None:
    with envoy_server(models) as server:
        with grpc.insecure_channel(server.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch
            for _ in range(20):
                streams = [watch(Check()) for _ in range(20)]
                assert next(streams[0]).status == Answer.SERVING  # so others have theirs, or are about to
                for stream in streams:
                    stream.cancel()
        server.until(lambda state: state.streams == 0)
        assert "Traceback" not in server.log()


def test_ending_in_the_midst_of_cancelled_uploads_leaves_no_complaint(models: Path) -> None:
    with envoy_server(models) as server:
        connections = [Connection(server.target) for _ in range(5)]
        for connection in connections:
            for _ in range(20):
                connection.send(connection.open(ENCODE, grpc_timeout="20m"), request(0.0)[:-1], end=False)
        for connection in connections:
            connection.socket.close()
        server.until(lambda state: state.streams == 0)
        assert "Exception" not in server.log()


def test_while_models_load_health_says_so_and_calls_are_unavailable(models: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    often = [("grpc.max_reconnect_backoff_ms", 100), ("grpc.initial_reconnect_backoff_ms", 100)]
    with (
        tempfile.TemporaryFile("w+") as log,
        spawn(settings(models, port=port), log, TESTS_HOLD_LOADING=str(tmp_path / "go on")) as process,
        grpc.insecure_channel(f"127.0.0.1:{port}", often) as channel,
    ):
        try:
            watch = health_pb2_grpc.HealthStub(channel).Watch(Check(), wait_for_ready=True, timeout=60)
            assert next(watch).status == Answer.NOT_SERVING
            with pytest.raises(grpc.RpcError, match="the server is loading its models; try again") as early:
                Stub(channel).ListModels(pb.ListModelsRequest())
            assert early.value.code() == grpc.StatusCode.UNAVAILABLE
            (tmp_path / "go on").touch()
            assert next(watch).status == Answer.SERVING
            assert len(Stub(channel).ListModels(pb.ListModelsRequest()).models) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_all_addresses_of_a_name_are_listened_on_at_one_port(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        known = ["127.0.0.1", "127.0.0.1", "127.0.0.2", "192.0.2.1"]  # the last one is no machine's own
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in known]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    listened = addresses.endpoints("a-name", 0)
    assert [host for host, _ in listened] == ["127.0.0.1", "127.0.0.2"]
    assert len({port for _, port in listened}) == 1
    assert listened[0][1] > 0
    listener = envoy.configuration(settings(models), listened, Path(), 0)["static_resources"]["listeners"][0]
    assert listener["address"]["socket_address"]["address"] == "127.0.0.1"
    assert [each["address"]["socket_address"]["address"] for each in listener["additional_addresses"]] == ["127.0.0.2"]
    with socket.create_server(("127.0.0.2", 0)) as taken, pytest.raises(StartError, match="Address already in use"):
        addresses.endpoints("a-name", taken.getsockname()[1])


def test_killed_it_frees_its_port_and_starts_again(models: Path) -> None:
    with envoy_server(models) as first:
        occupied = grpc.insecure_channel(first.target)
        call = Stub(occupied).ListModels.future(pb.ListModelsRequest())
        assert len(call.result().models) == 1
        first.process.kill()
        first.end(-signal.SIGKILL)
        with envoy_server(models, port=first.server.port) as second:
            assert len(Stub(occupied).ListModels(pb.ListModelsRequest(), wait_for_ready=True, timeout=30).models) == 1
            assert second.target == first.target
        occupied.close()


def test_nothing_is_left_behind_and_nobody_else_may_look_in(models: Path, tmp_path: Path) -> None:
    server = EnvoyServer(settings(models), TMPDIR=str(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.iterdir()} == {"envoy.json", "admin.sock"}
    environment = Path(f"/proc/{server.process.pid}/environ")
    assert not environment.exists() or environment.stat().st_uid == os.getuid()
    server.stop()
    assert not list(tmp_path.iterdir())


def test_renewed_files_count_when_envoy_has_taken_each_and_leave_nothing_old(models: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    authority, clients, others = (Authority(tmp_path, name) for name in ("authority", "clients", "others"))
    certificate, key = authority.issue()
    client_certificate, client_key = others.issue("client")
    with envoy_server(models, own, tls_cert=certificate, tls_key=key, client_ca=clients.file) as server:
        assert len(list(own.glob("vaeserve-*/tls-*"))) == 1
        clients.file.write_bytes(others.file.read_bytes())
        wait_for_log(server, "the certificate changed and is in use")
        assert len(list(own.glob("vaeserve-*/tls-*"))) == 1
        with Client(server.target, tls=TLS(authority.file, client_key, client_certificate), max_attempts=1) as client:
            assert client.models()
        with clients.file.open("a") as file:  # which Python's OpenSSL passes over and Envoy's refuses
            file.write("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
        wait_for_log(server, f"keeping the old: --client-ca {clients.file}: Envoy does not take it")


def wait_for_log(server: EnvoyServer, words: str) -> None:
    deadline = time.monotonic() + 60
    while words not in server.log():
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.05)


def test_a_drain_ends_well_without_the_folder_that_somebody_cleaned_away(models: Path, tmp_path: Path) -> None:
    images = tensors.to_tensor(np.full((1, *IMAGE), A_SECOND, np.float32))
    with (
        envoy_server(models, tmp_path, drain_s=30.0) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        in_flight = Stub(channel).Encode.future(pb.EncodeRequest(images=images))
        server.until(lambda state: state.models.pool._free == 0)
        shutil.rmtree(*tmp_path.iterdir())
        server.process.send_signal(signal.SIGTERM)
        assert in_flight.result().mean.shape == [1, 3]
        log = server.end(0)
    assert "WARNING Envoy cannot be asked to end" in log
    assert "INFO stopped" in log
    assert "Traceback" not in log


def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT)
    (folder / "decoder.onnx").write_bytes(b"something else")
    with pytest.raises(StartError, match="its SHA-256 is"):
        EnvoyServer(settings(tmp_path))


def test_a_missing_extra_is_told_in_one_line(models: Path) -> None:
    program = "import sys; sys.modules['pyvoy'] = None; from vaeserve_server.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "--models", str(models), "--transport", "envoy", "--port", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert line.endswith('cannot start: --transport envoy needs pyvoy; pip install "vaeserve[envoy]"')


def test_a_python_without_a_shared_library_is_told_so(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvoy._server.get_envoy_environ", dict)
    with pytest.raises(StartError, match="needs Python as a shared library, and this Python has none"):
        envoy.execute(settings(models))


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_start_that_fails_says_why_and_leaves_no_folder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    words = r"^--transport envoy cannot write its few temporary files \(.*{}.*\); give it a place with TMPDIR$"
    with pytest.raises(StartError, match=words.format("No such file or directory")):
        envoy.execute(settings(models))
    own.mkdir()
    with monkeypatch.context() as patch, pytest.raises(StartError, match=words.format("No space left on device")):
        patch.setattr(Path, "write_text", _full_disk)
        envoy.execute(settings(models))
    far = own / ("x" * 100)
    far.mkdir()
    with monkeypatch.context() as patch, pytest.raises(StartError, match=words.format("a socket's path has at most")):
        patch.setattr(tempfile, "tempdir", str(far))
        envoy.execute(settings(models))
    far.rmdir()  # nothing is in it
    certificates = Authority(tmp_path)
    certificate, _ = certificates.issue()
    _, another_key = certificates.issue("another")
    with pytest.raises(StartError, match="it is not the key of the first certificate"):
        envoy.execute(settings(models, tls_cert=certificate, tls_key=another_key))
    assert list(own.iterdir()) == []
