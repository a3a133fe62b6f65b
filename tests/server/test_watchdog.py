"""Runs that raise, runs that never end: their calls are told, their model leaves service and returns, others go on."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bundles import ENCODER, brittle_encoder, encoder, endless_on_zeros, run_directly, slow_encoder, write_bundle
from metrics_page import scrape_until
from serving import RunningServer, running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import engine, graphs
from vaeserve_server.errors import BundleError

Stub = vae_pb2_grpc.VaeServiceStub
IMAGE, LATENT = (1, 4, 4), (3,)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
WATCHDOG_S = 0.4
LIMIT_S = 60.0
DUD = 0.75  # a brightest pixel, by which a run knows that it is to go wrong
IN_PROCESS = {"transport": "grpc"}  # to reach inside the sessions


class Sessions:
    """Stands between the server and ONNX Runtime: what `fault` does for a batch with a pixel of DUD."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.fault: Callable[[], None] = self.hang
        self.everything = False  # whether each batch of the first session that met a DUD goes wrong from then on
        self._hit: set[int] = set()

    def hang(self) -> None:
        """Do not end, and listen to nothing, like a kernel that hangs."""
        assert self.let_go.wait(LIMIT_S)

    def fail(self) -> None:
        raise RuntimeError("CUDA failure 719: unspecified launch failure")

    def new(self, data: bytes, provider: str, cuda: graphs.CudaOptions) -> Any:
        return _Session(self, onnxruntime.InferenceSession(data, providers=[provider]))

    def before_run(self, session: object, batch: np.ndarray) -> None:
        if batch.shape[1:] == IMAGE and (batch == np.float32(DUD)).any():
            self._hit.add(id(session))
        elif not (self.everything and id(session) in self._hit):
            return
        self.fault()


class _Session:
    def __init__(self, owner: Sessions, session: onnxruntime.InferenceSession) -> None:
        self._owner = owner
        self._session = session

    def run(self, names: list[str], feed: dict[str, np.ndarray], options: Any) -> Any:
        self._owner.before_run(self, next(iter(feed.values())))
        return self._session.run(names, feed, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sessions]:
    made = Sessions()
    monkeypatch.setattr(graphs, "_session", made.new)
    yield made
    made.let_go.set()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("hangs", "works"):
        write_bundle(tmp_path, name, image_shape=IMAGE, latent_shape=LATENT)
    return tmp_path


@pytest.fixture
def server(models: Path, sessions: Sessions) -> Iterator[RunningServer]:
    with running_server(models, threads=1, watchdog_s=WATCHDOG_S, drain_s=0.0, **IN_PROCESS) as running:
        yield running
        sessions.let_go.set()


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as opened:
        yield opened


def encode(name: str, pixel: float = 0.0, rows: int = 1) -> pb.EncodeRequest:
    images = tensors.to_tensor(np.full((rows, *IMAGE), pixel, np.float32))
    return pb.EncodeRequest(model=pb.ModelRef(name=name), images=images)


def failure(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call.result(LIMIT_S)
    return raised.value


class Health:
    """The state of one name, as a watcher hears it."""

    def __init__(self, channel: grpc.Channel, name: str) -> None:
        self._states: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=name))
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> int:
        return self._states.get(timeout=LIMIT_S)

    def _read(self) -> None:
        try:
            for response in self._stream:
                self._states.put(response.status)
        except grpc.RpcError:  # the channel was closed
            pass


def status(channel: grpc.Channel, name: str) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name)).status


def test_a_run_that_hangs_takes_its_model_out_of_service_and_no_other(
    server: RunningServer, channel: grpc.Channel, sessions: Sessions, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vaeserve_server")
    stub, health = Stub(channel), Health(channel, "hangs")
    assert health.next() == SERVING
    hanging = stub.Encode.future(encode("hangs", DUD))
    server.until(lambda running: running.models.pool._free == 0)  # type: ignore[union-attr]
    behind = stub.Encode.future(encode("hangs"))  # waits behind it, in the only thread
    elsewhere = stub.Encode.future(encode("works", 0.5))
    assert health.next() == NOT_SERVING
    for call in (hanging, behind):
        error = failure(call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details() == "the model does not answer: a run does not end"
    direct = run_directly(models / "works" / "1", ENCODER, np.full((1, *IMAGE), 0.5, np.float32))[0]
    np.testing.assert_allclose(tensors.from_tensor(elsewhere.result(LIMIT_S).mean), direct, rtol=1e-5)
    refused = failure(stub.Encode.future(encode("hangs")))
    assert refused.code() == grpc.StatusCode.UNAVAILABLE
    assert refused.details() == (
        "model hangs/1 does not serve now: a run does not end in its encoder; try again, or another server"
    )
    assert [status(channel, name) for name in ("hangs", "hangs/1", "works", "works/1", "")] == [
        NOT_SERVING,
        NOT_SERVING,
        SERVING,
        SERVING,
        SERVING,
    ]
    page = scrape_until(server, lambda page: page("vaeserve_model_serving", model="works") == 1)
    assert page("vaeserve_model_serving", model="hangs") == 0
    assert len(stub.ListModels(pb.ListModelsRequest()).models) == 2

    sessions.let_go.set()  # the run returns
    assert health.next() == SERVING
    assert len(stub.Encode(encode("hangs")).mean.data) == 12
    server.until(lambda running: len(running.models.pool.workers) == 1 and running.models.pool._free == 1)  # type: ignore[union-attr]
    messages = [record.message for record in caplog.records]
    assert messages.count("model does not serve") == messages.count("model serves again") == 1


def test_a_model_that_hangs_comes_back_by_a_reload(
    server: RunningServer, channel: grpc.Channel, sessions: Sessions
) -> None:
    stub, health = Stub(channel), Health(channel, "hangs")
    assert health.next() == SERVING
    hanging = stub.Encode.future(encode("hangs", DUD))
    assert health.next() == NOT_SERVING
    failure(hanging)
    server.server.reload()
    assert health.next() == SERVING
    assert len(stub.Encode(encode("hangs")).mean.data) == 12
    sessions.let_go.set()
    server.until(lambda running: len(running.models.pool.workers) == 1)  # type: ignore[union-attr]
    assert status(channel, "hangs") == SERVING


def test_where_no_model_serves_the_server_does_not(models: Path, sessions: Sessions) -> None:
    shutil.rmtree(models / "works")
    settings = {"threads": 1, "watchdog_s": WATCHDOG_S, "drain_s": 0.0, **IN_PROCESS}
    with running_server(models, **settings) as server, grpc.insecure_channel(server.target) as channel:
        health = Health(channel, "")
        assert health.next() == SERVING
        hanging = Stub(channel).Encode.future(encode("", DUD))
        assert health.next() == NOT_SERVING
        failure(hanging)
        sessions.let_go.set()
        assert health.next() == SERVING


def test_a_run_that_listens_is_broken_off(tmp_path: Path) -> None:
    graph = {ENCODER: slow_encoder(IMAGE, LATENT)}
    write_bundle(tmp_path, "slow", image_shape=IMAGE, latent_shape=LATENT, graphs=graph)
    with (
        running_server(tmp_path, threads=1, watchdog_s=WATCHDOG_S) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        health = Health(channel, "slow")
        assert health.next() == SERVING
        endless = Stub(channel).Encode.future(encode("slow", 1.0))  # a minute
        assert health.next() == NOT_SERVING
        assert failure(endless).code() == grpc.StatusCode.UNAVAILABLE
        assert health.next() == SERVING  # long before the minute is over: a test of this file would end
        assert len(Stub(channel).Encode(encode("slow")).mean.data) == 12


def test_a_run_that_raises_fails_its_own_call_and_no_input_takes_the_model_down(tmp_path: Path) -> None:
    graph = {ENCODER: brittle_encoder(IMAGE, LATENT)}
    write_bundle(tmp_path, "brittle", image_shape=IMAGE, latent_shape=LATENT, graphs=graph)
    with running_server(tmp_path, threads=1) as server, grpc.insecure_channel(server.target) as channel:
        stub = Stub(channel)
        calls = [stub.Encode.future(encode("brittle", pixel)) for pixel in (1.0, 0.0, 1.0, 0.5) * 10]
        codes = [call.code() for call in calls]
        assert codes == [grpc.StatusCode.INTERNAL, grpc.StatusCode.OK] * 20
        page = scrape_until(server, lambda page: page("vaeserve_calls_total", rpc="Encode") == 40)
        assert page("vaeserve_model_serving") == 1
        assert status(channel, "brittle") == SERVING


def test_a_graph_that_has_stopped_running_at_all_leaves_service_until_it_runs(
    server: RunningServer, channel: grpc.Channel, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions.fault, sessions.everything = sessions.fail, True
    stub, health = Stub(channel), Health(channel, "hangs")
    assert health.next() == SERVING
    error = failure(stub.Encode.future(encode("hangs", DUD)))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "CUDA" not in error.details()
    assert health.next() == NOT_SERVING
    refused = failure(stub.Encode.future(encode("hangs")))
    assert refused.code() == grpc.StatusCode.UNAVAILABLE
    assert "model hangs/1 does not serve now: runs fail in its encoder" in refused.details()
    assert len(stub.Encode(encode("works")).mean.data) == 12
    sessions.everything = False
    assert health.next() == SERVING
    assert len(stub.Encode(encode("hangs")).mean.data) == 12


def test_a_new_version_that_hangs_when_it_is_warmed_is_refused(
    models: Path, sessions: Sessions, channel: grpc.Channel, server: RunningServer
) -> None:
    graph = {ENCODER: endless_on_zeros(IMAGE, LATENT)}
    write_bundle(models, "works", "2", image_shape=IMAGE, latent_shape=LATENT, graphs=graph)
    server.server.reload()
    scrape_until(server, lambda page: page("vaeserve_refused_versions", model="works", version="2") == 1)
    assert Stub(channel).Encode(encode("works")).model.version == "1"


class LateStop(graphs.Graph):
    """A graph whose run ends in the moment in which it is stopped for having taken too long."""

    def __init__(self, data: bytes) -> None:
        super().__init__(onnxruntime.InferenceSession(data, providers=[graphs.CPU]), 1)
        self._stopping = threading.Event()

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        outputs = super().run(batch)
        assert self._stopping.wait(LIMIT_S)
        return outputs

    def stop(self) -> None:
        self._stopping.set()
        threading.Event().wait(0.1)  # the run's thread is faster
        super().stop()


def test_a_graph_that_was_stopped_as_its_run_ended_is_refused() -> None:
    graph = LateStop(encoder(IMAGE, LATENT).SerializeToString())
    with pytest.raises(BundleError, match=r"run on 1 rows does not end within 0\.01 s"):
        engine._warm(Path("encoder.onnx"), graph, 1, 0.01)


def test_a_drain_does_not_wait_for_a_run_that_never_ends(
    models: Path, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vaeserve_server import executor

    monkeypatch.setattr(executor, "_LAST_RUNS_S", 0.1)
    with running_server(models, threads=1, watchdog_s=0.0, drain_s=0.0, **IN_PROCESS) as server:
        channel = grpc.insecure_channel(server.target)
        hanging = Stub(channel).Encode.future(encode("hangs", DUD))
        server.until(lambda running: running.models.pool._free == 0)  # type: ignore[union-attr]
    assert failure(hanging).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    channel.close()
    assert not sessions.let_go.is_set()  # and yet the server has stopped
