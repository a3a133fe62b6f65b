"""`vaeserve-server` as an operator meets it: a process with flags, signals, lines and exit statuses."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bundles import ENCODER, endless_on_zeros, slow_encoder, write_bundle
from processes import COMMAND, ENVIRONMENT, server_process
from serving import running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

Stub = vae_pb2_grpc.VaeServiceStub
IMAGE, LATENT = (1, 4, 4), (3,)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one with an encoder that takes a minute times the brightest pixel."""
    folder = tmp_path_factory.mktemp("models")
    shapes = {"image_shape": IMAGE, "latent_shape": LATENT}
    write_bundle(folder, "quick", **shapes)  # type: ignore[arg-type]
    write_bundle(folder, "slow", graphs={ENCODER: slow_encoder(IMAGE, LATENT)}, **shapes)  # type: ignore[arg-type]
    return folder


def refused(*flags: str, **environment: str) -> tuple[int, str]:
    """Run a server that cannot start; return exit status and standard error."""
    finished = subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, timeout=30, env=ENVIRONMENT | environment, check=False
    )
    assert finished.stdout == ""
    return finished.returncode, finished.stderr


def slow_request(pixel: float) -> pb.EncodeRequest:
    images = tensors.to_tensor(np.full((1, *IMAGE), pixel, np.float32))
    return pb.EncodeRequest(model=pb.ModelRef(name="slow"), images=images)


def start_slow_call(channel: grpc.Channel, pixel: float) -> grpc.Future:
    """Send a call and return once the server has it: calls arrive in order on a connection that is there already."""
    stub = Stub(channel)
    stub.ListModels(pb.ListModelsRequest())
    call = stub.Encode.future(slow_request(pixel))
    stub.ListModels(pb.ListModelsRequest())
    return call


class Watch:
    """The health stream, read all the time: grpcio drops what has not been read when a stream ends."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._statuses: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self.next() == health_pb2.HealthCheckResponse.SERVING

    def next(self) -> int:
        return self._statuses.get(timeout=20)

    def join(self) -> None:
        """Wait for the stream's end."""
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            for response in self._stream:
                self._statuses.put(response.status)


def one_line(log: str) -> str:
    (line,) = log.splitlines()
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_what_is_in_flight_and_exits_0(models: Path, number: signal.Signals) -> None:
    with server_process(models) as process, grpc.insecure_channel(process.target) as channel:
        assert process.ready_line == f"serving quick/1, slow/1 on {process.target} (CPUExecutionProvider)"
        health = Watch(channel)
        in_flight = start_slow_call(channel, 0.01)
        process.signal(number)
        assert health.next() == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as late, grpc.insecure_channel(process.target) as another:
            Stub(another).ListModels(pb.ListModelsRequest())
        # grpcio cancels what arrives in the very moment in which it shuts down.
        assert late.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert not in_flight.done()
        assert in_flight.result().mean.shape == [1, 3]
        status, log = process.end()
    assert status == 0
    assert "INFO draining delay_s=0.0 limit_s=30.0" in log
    assert "Traceback" not in log


def test_a_signal_ends_a_server_whose_models_do_not_come_to_load(tmp_path: Path) -> None:
    """An orchestrator kills what does not end in time, however long it would have taken to serve."""
    endless = endless_on_zeros(IMAGE, LATENT)
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: endless})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        target = f"127.0.0.1:{taken.getsockname()[1]}"
    command = [*COMMAND, "--models", str(tmp_path), "--port", target.rpartition(":")[2], "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as popen:
        try:
            with grpc.insecure_channel(target) as channel:
                request = health_pb2.HealthCheckRequest()
                early = health_pb2_grpc.HealthStub(channel).Check(request, wait_for_ready=True, timeout=30)
                assert early.status == health_pb2.HealthCheckResponse.NOT_SERVING
                with pytest.raises(grpc.RpcError, match="the server is loading its models; try again"):
                    Stub(channel).ListModels(pb.ListModelsRequest())
            popen.send_signal(signal.SIGTERM)
            said, log = popen.communicate(timeout=30)
        finally:
            popen.kill()
    assert popen.returncode == 0, log
    assert said == ""
    assert "INFO stopped before it served" in log
    assert "Traceback" not in log


def test_idle_connections_and_streams_do_not_hold_up_the_end(models: Path) -> None:
    with server_process(models, "--drain-s", "3600") as process, grpc.insecure_channel(process.target) as channel:
        health = Watch(channel)
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0
        health.join()


def test_the_drain_limit_breaks_off_a_call_that_never_ends(models: Path) -> None:
    with server_process(models, "--drain-s", "0.1") as process, grpc.insecure_channel(process.target) as channel:
        endless = start_slow_call(channel, 1.0)
        process.signal(signal.SIGTERM)
        status, log = process.end()
        with pytest.raises(grpc.RpcError, match="the model stopped being served while the call ran") as broken_off:
            endless.result()
    assert broken_off.value.code() == grpc.StatusCode.UNAVAILABLE
    assert status == 0
    assert "Traceback" not in log


def test_a_second_signal_cuts_the_drain_short(models: Path) -> None:
    with server_process(models, "--drain-s", "3600") as process, grpc.insecure_channel(process.target) as channel:
        health = Watch(channel)
        start_slow_call(channel, 1.0)
        process.signal(signal.SIGTERM)
        assert health.next() == health_pb2.HealthCheckResponse.NOT_SERVING
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0


def test_during_the_delay_calls_are_still_answered(models: Path) -> None:
    with (
        server_process(models, "--drain-delay-s", "3600") as process,
        grpc.insecure_channel(process.target) as channel,
    ):
        health = Watch(channel)
        process.signal(signal.SIGTERM)
        assert health.next() == health_pb2.HealthCheckResponse.NOT_SERVING
        with grpc.insecure_channel(process.target) as another:
            assert len(Stub(another).ListModels(pb.ListModelsRequest()).models) == 2
        process.signal(signal.SIGINT)
        assert process.end()[0] == 0


def test_a_taken_port_is_told_in_one_line(models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, log = refused("--models", str(models), "--port", str(port), "--device", "cpu")
    assert status == 1
    expected = (
        f"cannot start: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --host or --port"
    )
    assert expected in one_line(log)


def test_two_servers_cannot_share_a_port(models: Path) -> None:
    with running_server(models) as first:
        status, log = refused("--models", str(models), "--port", str(first.server.port), "--device", "cpu")
    assert status == 1
    assert "Address already in use" in one_line(log)


def test_cuda_without_a_gpu_is_refused_in_one_line(models: Path) -> None:
    status, log = refused("--models", str(models), "--port", "0", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert status == 1
    line = one_line(log)
    assert "cannot start: device cuda cannot be used: " in line
    assert 'install "vaeserve[server,cuda]" and an NVIDIA driver that goes with it, or choose --device cpu' in line


def test_a_tampered_bundle_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT)
    (folder / "decoder.onnx").write_bytes(b"something else")
    status, log = refused("--models", str(tmp_path), "--port", "0", "--device", "cpu")
    assert status == 1
    assert f"cannot start: {folder / 'decoder.onnx'}: its SHA-256 is " in one_line(log)


def test_a_server_that_others_reach_must_be_wanted_insecure(models: Path) -> None:
    status, log = refused("--models", str(models), "--host", "0.0.0.0", "--port", "0")
    assert status == 2
    assert "host 0.0.0.0 can be reached from other machines" in one_line(log)
    with server_process(models, "--host", "0.0.0.0", "--insecure") as process:
        assert " on 0.0.0.0:" in process.ready_line


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("localhost", ["localhost"]),
        pytest.param("::1", ["[::1]"], marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
        pytest.param("::", ["127.0.0.1", "[::1]"], marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    ],
)
def test_a_host_may_be_a_name_or_an_address_of_either_family(models: Path, host: str, reached: list[str]) -> None:
    with server_process(models, "--host", host, "--insecure") as process:
        port = process.target.rpartition(":")[2]
        for each in reached:
            with grpc.insecure_channel(f"{each}:{port}") as channel:
                assert len(Stub(channel).ListModels(pb.ListModelsRequest(), timeout=20).models) == 2


def test_wrong_flags_and_variables_are_told_in_one_line() -> None:
    status, log = refused("--port", "99999", VAESERVE_DRAIN_S="-1")
    assert status == 2
    assert one_line(log) == (
        "vaeserve-server: --port (or VAESERVE_PORT) is '99999': input should be less than or equal to 65535; "
        "--drain-s (or VAESERVE_DRAIN_S) is '-1': input should be greater than or equal to 0"
    )


@pytest.mark.parametrize(
    "missing", ["onnxruntime", "pydantic_settings", "grpc_reflection", "pydantic", "prometheus_client"]
)
def test_a_missing_extra_is_told_in_one_line(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from vaeserve_server.__main__ import main; sys.exit(main())"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert finished.returncode == 2
    assert one_line(finished.stderr).startswith(f"vaeserve-server needs {missing}")
    assert finished.stderr.endswith('; install the server: pip install "vaeserve[server]"\n')


def test_a_served_model_takes_less_than_300_mb(models_dir: Path) -> None:
    with server_process(models_dir) as process:
        status = Path(f"/proc/{process.popen.pid}/status").read_text()
    (resident_kb,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert resident_kb < 300 * 1024


def test_debug_logs_one_json_line_per_call(models: Path) -> None:
    with (
        server_process(models, "--log-level", "debug", "--log-format", "json") as process,
        grpc.insecure_channel(process.target) as channel,
    ):
        Stub(channel).Sample(pb.SampleRequest(model=pb.ModelRef(name="quick"), count=2))
        with pytest.raises(grpc.RpcError):
            Stub(channel).Sample(pb.SampleRequest(model=pb.ModelRef(name="quick"), count=0))
        process.signal(signal.SIGTERM)
        _, log = process.end()
    entries = [json.loads(line) for line in log.splitlines()]
    calls = [(entry["rpc"], entry["code"]) for entry in entries if entry["message"] == "call"]
    assert calls == [("Sample", "OK"), ("Sample", "INVALID_ARGUMENT")]
    assert {entry["level"] for entry in entries} == {"info", "debug"}
