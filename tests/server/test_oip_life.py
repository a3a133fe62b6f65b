"""The Open Inference Protocol while models load, queues fill and deadlines pass, and where its extra is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason='the protocol is an extra; pip install "vaeserve[oip]"')

from tritonclient.grpc import InferenceServerClient, InferenceServerException, service_pb2, service_pb2_grpc

from bundles import ENCODER, slow_encoder, write_bundle
from certificates import Authority
from oip_calls import add, inputs, request, scalars, translated
from serving import RunningServer, queued_rows, running_server
from vaeserve.v1 import vae_pb2 as pb
from vaeserve_server import tokens
from vaeserve_server.app import Server
from vaeserve_server.tokens import TokenFile

IMAGE, LATENT = (1, 4, 4), (3,)
A_SECOND, MUCH_TOO_LONG = 0.02, 1.0
EXHAUSTED, EXPIRED = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED


def pixels(pixel: float, rows: int = 1, timeout_us: int = 0) -> Any:
    batch = np.full((rows, *IMAGE), pixel, np.float32)
    made = request("mnist-encoder", "", {"timeout": timeout_us} if timeout_us else {})
    return add(made, "image", "FP32", batch.shape, batch.tobytes())


@pytest.fixture
def slow_server(tmp_path: Path) -> Iterator[RunningServer]:
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: slow_encoder(IMAGE, LATENT)})
    settings = {"oip": True, "threads": 1, "max_queue_rows": 10, "max_batch_rows": 1, "drain_s": 0}
    with running_server(tmp_path, **settings) as running:
        yield running


@pytest.fixture
def channel(slow_server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(slow_server.target) as opened:
        yield opened


@pytest.fixture
def oip(channel: grpc.Channel) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def is_busy(server: Server) -> bool:
    pool: Any = server.models.pool
    return bool(pool._free < pool.threads)


def failure(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


def test_a_full_queue_refuses_with_push_back(slow_server: RunningServer, oip: Any) -> None:
    calls = [oip.ModelInfer.future(pixels(MUCH_TOO_LONG))]  # kept, or they would be cancelled
    slow_server.until(is_busy)
    calls.append(oip.ModelInfer.future(pixels(0.0, rows=10)))
    slow_server.until(lambda server: queued_rows(server) == 10)
    error = failure(lambda: oip.ModelInfer(pixels(0.0)))
    assert error.code() == EXHAUSTED
    assert "grpc-retry-pushback-ms" in dict(error.trailing_metadata())


def test_while_no_queue_takes_a_row_calls_are_refused_unread(
    slow_server: RunningServer, oip: Any, channel: grpc.Channel
) -> None:
    calls = [oip.ModelInfer.future(pixels(MUCH_TOO_LONG))]
    slow_server.until(is_busy)
    calls.append(oip.ModelInfer.future(pixels(0.0, rows=10)))
    slow_server.until(lambda server: queued_rows(server) == 10)
    unread = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", None, None)
    read = failure(lambda: unread(b"\xff no message"))  # for it may be for the decoder
    assert read.code() == grpc.StatusCode.INVALID_ARGUMENT
    calls.append(oip.ModelInfer.future(translated(pb.SampleRequest(model=pb.ModelRef(name="mnist"), count=10))))
    slow_server.until(lambda server: queued_rows(server) == 20)
    error = failure(lambda: unread(b"\xff no message"))
    assert error.code() == EXHAUSTED
    assert error.details().startswith("the queue is full; try again in ")
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    assert oip.ServerLive(service_pb2.ServerLiveRequest()).live


def test_deadlines_and_timeouts_end_calls(slow_server: RunningServer, oip: Any) -> None:
    running = oip.ModelInfer.future(pixels(A_SECOND))
    slow_server.until(is_busy)
    late = oip.ModelInfer.future(pixels(0.0, timeout_us=1000))
    assert failure(lambda: oip.ModelInfer(pixels(0.0), timeout=0.05)).code() == EXPIRED
    with InferenceServerClient(slow_server.target) as client:
        batch = inputs(image=np.zeros((1, *IMAGE), np.float32))
        with pytest.raises(InferenceServerException) as failed:
            client.infer("mnist-encoder", batch, client_timeout=0.05)
    assert failed.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    error = failure(late.result)
    assert (error.code(), error.details()) == (EXPIRED, "the deadline passed while the call was queued")
    assert running.result().model_name == "mnist-encoder"


@pytest.mark.parametrize("transport", ["grpc", "envoy"])
def test_certificates_and_tokens_are_asked_for_as_ever(several_models: Path, tmp_path: Path, transport: str) -> None:
    if transport == "envoy":
        pytest.importorskip("pyvoy")
    authority = Authority(tmp_path)
    certificate, key = authority.issue()
    secret, token = tokens.make("triton", ["inference.GRPCInferenceService/ModelInfer"], None)
    (tmp_path / "tokens.json").write_text(TokenFile(tokens=(token,)).model_dump_json(exclude_none=True))
    protected = {"tls_cert": certificate, "tls_key": key, "tokens": tmp_path / "tokens.json"}
    with (
        running_server(several_models, oip=True, transport=transport, **protected) as server,
        InferenceServerClient(server.target, ssl=True, root_certificates=str(authority.file)) as client,
    ):
        assert client.is_server_ready()  # as open as the health service
        count = scalars(count=2, seed=7)
        with pytest.raises(InferenceServerException) as refused:
            client.infer("mnist-sampler", count)
        assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
        bearer = {"authorization": f"Bearer {secret}"}
        assert client.infer("mnist-sampler", count, headers=bearer).as_numpy("latent").shape == (2, 4)
        with pytest.raises(InferenceServerException, match="the token triton is not for"):
            client.get_model_metadata("mnist-sampler", headers=bearer)


@pytest.mark.in_process
def test_readiness_is_that_of_the_health_service(several_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    load, stop = Server._load, Server.stop

    async def look(server: Server) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            seen.append((await stub.ServerLive(service_pb2.ServerLiveRequest())).live)
            seen.append((await stub.ServerReady(service_pb2.ServerReadyRequest())).ready)
            seen.append((await stub.ModelReady(service_pb2.ModelReadyRequest(name="mnist-encoder"))).ready)
            try:
                await stub.RepositoryIndex(service_pb2.RepositoryIndexRequest())
            except grpc.aio.AioRpcError as error:
                seen.append(error.code())

    async def look_and_load(server: Server) -> None:
        await look(server)
        await load(server)

    async def look_and_stop(server: Server) -> None:
        await look(server)
        server._health.set_serving(False)
        await look(server)
        await stop(server)

    monkeypatch.setattr(Server, "_load", look_and_load)
    monkeypatch.setattr(Server, "stop", look_and_stop)
    with running_server(several_models, oip=True):
        pass
    loading, serving, leaving = [True, False, False, grpc.StatusCode.UNAVAILABLE], [True] * 3, [True, False, False]
    assert seen == [*loading, *serving, *leaving]


@pytest.mark.in_process
def test_a_model_out_of_service_is_not_ready(several_models: Path) -> None:
    def hang(server: Server) -> bool:
        assert server.models.repository is not None
        engine = server.models.repository.resolve("mnist", "1", "")
        engine.problem = "a run does not end"
        engine.on_change()
        return True

    with running_server(several_models, oip=True) as server, InferenceServerClient(server.target) as client:
        assert client.is_model_ready("mnist-decoder", "1")
        server.until(hang)
        assert not client.is_model_ready("mnist-decoder", "1")
        assert client.is_model_ready("mnist-decoder")
        assert client.is_server_ready()
        index = client.get_model_repository_index()
        unavailable = {(model.name, model.version, model.reason) for model in index.models if model.state != "READY"}
        assert unavailable == {
            (f"mnist-{role}", "1", "a run does not end") for role in ("encoder", "decoder", "sampler")
        }


def test_without_the_setting_nothing_of_it_is_loaded() -> None:
    program = "import sys, vaeserve_server.start; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    roots = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert not roots & {"tritonclient", "rapidjson", "ml_dtypes"}


@pytest.mark.parametrize(
    ("missing", "flags"),
    [
        ("tritonclient", []),
        ("rapidjson", []),
        ("tritonclient", ["--transport", "envoy"]),
    ],
)
def test_a_missing_extra_is_told_in_one_line(
    several_models: Path, tmp_path: Path, missing: str, flags: list[str]
) -> None:
    if "envoy" in flags:
        pytest.importorskip("pyvoy")
    # In every process, Envoy's and the workers' too: a module of that name which is found first, and is not there.
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None\n")
    command = [sys.executable, "-m", "vaeserve_server", "--models", str(several_models), "--device", "cpu", "--oip"]
    ports = ["--port", "0", "--metrics-port", "0"]
    finished = subprocess.run(
        [*command, *ports, *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": ":".join([str(tmp_path), *filter(None, sys.path)])},
    )
    assert finished.returncode == 1, finished.stderr
    told = [line for line in finished.stderr.splitlines() if "ENVOY" not in line]
    assert len(told) == 1, finished.stderr
    assert told[0].endswith(f'cannot start: --oip needs {missing}; pip install "vaeserve[oip]"')
