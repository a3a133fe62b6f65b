"""The models folder changes under a server: what is new comes in, what is unsound stays out, and nobody notices."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bundles import ENCODER, run_directly, slow_encoder, write_bundle
from metrics_page import scrape, scrape_until
from processes import Process, server_process
from serving import RunningServer, running_server
from test_workers import supervised
from vaeserve import Client, tensors
from vaeserve.errors import FailedPrecondition, NotFound
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import loader as loading
from vaeserve_server.bundle import Bundle
from vaeserve_server.errors import BundleError, StartError
from vaeserve_server.loader import Loader, Policy
from vaeserve_server.models_folder import Key, ModelsFolder

IMAGE, LATENT = (1, 4, 4), (3,)
WATCH_S = 0.02
LIMIT_S = 60.0


def publish(models: Path, name: str = "mnist", version: str = "1", digit: str = "1", **options: Any) -> Path:
    """Put a version into the folder as the exporter does: by one rename."""
    staging = models.parent / "staging"
    options = {"image_shape": IMAGE, "latent_shape": LATENT, "digest": digit * 64, **options}
    made = write_bundle(staging, name, version, **options)
    (models / name).mkdir(parents=True, exist_ok=True)
    return made.rename(models / name / version)


def damage(bundle: Path) -> None:
    (bundle / "decoder.onnx").write_bytes(b"something else")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def labels(client: Client) -> list[str]:
    return [str(info.ref) for info in client.models()]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    publish(folder, version="1", digit="1")
    return folder


@pytest.fixture
def server(models: Path) -> Iterator[RunningServer]:
    with running_server(models, watch_s=WATCH_S, pin="mnist/3") as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as opened:
        yield opened


def test_a_new_version_answers_and_old_ones_do_to_those_who_name_them(
    models: Path, server: RunningServer, client: Client
) -> None:
    images = np.random.default_rng(1).random((3, *IMAGE), np.float32)
    before = client.encode(images)
    publish(models, version="2", digit="2")
    until(lambda: labels(client) == ["mnist/2", "mnist/1"])
    assert client.encode(images).model.digest == "2" * 64
    named = client.encode(images, model="mnist/1")
    assert named.model == before.model
    np.testing.assert_array_equal(named.mean, before.mean)
    assert client.decode(before).shape == (3, *IMAGE)  # by the decoder that its latents came with
    with pytest.raises(FailedPrecondition):
        client.encode(images, model=before.model.__class__(digest="1" * 64))
    page = scrape_until(server, lambda page: page("vaeserve_reloads_total", result="ok") == 1)
    assert page("vaeserve_model_versions", model="mnist") == 2
    assert page("vaeserve_model_info", version="2", digest="2" * 64) == 1


def test_only_the_newest_and_the_pinned_versions_stay(models: Path, server: RunningServer, client: Client) -> None:
    for version in "23456":
        publish(models, version=version, digit=version)
        until(lambda version=version: labels(client)[0] == f"mnist/{version}")  # type: ignore[misc]
    assert labels(client) == ["mnist/6", "mnist/5", "mnist/3"]
    with pytest.raises(NotFound, match="model mnist has no version '4' here; this server has 6, 5, 3"):
        client.sample(1, model="mnist/4")
    assert scrape(server)("vaeserve_model_versions", model="mnist") == 3


def test_a_corrupt_version_is_refused_and_named_until_it_changes(
    models: Path, server: RunningServer, client: Client
) -> None:
    corrupt = publish(models.parent / "elsewhere", version="2", digit="2")
    damage(corrupt)
    corrupt.rename(models / "mnist" / "2")
    scrape_until(server, lambda page: page("vaeserve_refused_versions", model="mnist", version="2") == 1)
    scrape_until(server, lambda page: page("vaeserve_reloads_total", result="failed") == 1)  # counted a moment later
    publish(models, "faces", "1")  # which the watch sees later, and so it has looked again
    until(lambda: labels(client) == ["faces/1", "mnist/1"])
    assert scrape(server)("vaeserve_reloads_total", result="failed") == 1
    shutil.rmtree(models / "mnist" / "2")
    publish(models, version="2", digit="2")
    until(lambda: labels(client) == ["faces/1", "mnist/2", "mnist/1"])
    page = scrape_until(server, lambda page: page("vaeserve_reloads_total", result="ok") == 2)
    assert page("vaeserve_refused_versions") == 0


def test_a_version_damaged_or_replaced_where_it_lies_never_stops_being_served(
    models: Path, server: RunningServer, client: Client
) -> None:
    damage(models / "mnist" / "1")
    scrape_until(server, lambda page: page("vaeserve_refused_versions", model="mnist", version="1") == 1)
    assert client.sample(2, seed=1).model.digest == "1" * 64
    shutil.rmtree(models / "mnist" / "1")
    publish(models, version="1", digit="a")
    until(lambda: client.model().digest == "a" * 64)
    assert client.sample(2, seed=1).model.digest == "a" * 64


def test_models_come_and_go_but_never_all_of_them(models: Path, server: RunningServer, client: Client) -> None:
    publish(models, "faces", "7", digit="f")
    until(lambda: labels(client) == ["faces/7", "mnist/1"])
    shutil.rmtree(models / "mnist")
    until(lambda: labels(client) == ["faces/7"])
    with pytest.raises(NotFound, match="there is no model 'mnist'; this server has faces"):
        client.sample(1, model="mnist")
    moved = models.rename(models.with_name("unmounted"))
    scrape_until(server, lambda page: page("vaeserve_reloads_total", result="failed") == 1)
    models.mkdir()
    scrape_until(server, lambda page: page("vaeserve_reloads_total", result="failed") == 2)
    assert client.sample(1).model.name == "faces"
    models.rmdir()
    moved.rename(models)
    publish(models, "faces", "8", digit="e")
    until(lambda: labels(client) == ["faces/8", "faces/7"])


@pytest.mark.in_process
def test_a_call_in_flight_ends_on_its_engine_whose_memory_is_then_given_back(models: Path) -> None:
    slow = publish(models, "slow", "1", digit="d", graphs={ENCODER: slow_encoder(IMAGE, LATENT)})
    with (
        running_server(models, watch_s=WATCH_S, threads=2) as server,
        Client(server.target) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        repository = server.server.models.repository
        assert repository is not None
        (engine,) = (engine for engine in repository.engines if engine.label == "slow/1")
        images = tensors.to_tensor(np.full((1, *IMAGE), 0.02, np.float32))  # a second
        request = pb.EncodeRequest(model=pb.ModelRef(name="slow"), images=images)
        call = vae_pb2_grpc.VaeServiceStub(channel).Encode.future(request)
        server.until(lambda running: running.models.pool._free == 1)  # type: ignore[union-attr]
        shutil.rmtree(slow.parent)
        until(lambda: labels(client) == ["mnist/1"])
        assert engine in server.server.models._retired
        assert not call.done()
        assert call.result().model.version == "1"
        server.until(lambda running: not running.models._retired)
        assert not any(hasattr(graph, "_session") for graph in engine._graphs.values())


@pytest.mark.in_process
def test_calls_are_answered_while_a_version_loads(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading_now, go_on = threading.Event(), threading.Event()
    read = loading.read_bundle

    def read_slowly(folder: Path, name: str, version: str) -> Bundle:
        if version == "2":
            loading_now.set()
            assert go_on.wait(LIMIT_S)
        return read(folder, name, version)

    monkeypatch.setattr(loading, "read_bundle", read_slowly)
    with running_server(models, watch_s=WATCH_S) as server, Client(server.target) as client:
        publish(models, version="2", digit="2")
        assert loading_now.wait(LIMIT_S)
        for _ in range(20):
            assert client.sample(1).model.version == "1"
        go_on.set()
        until(lambda: client.sample(1).model.version == "2")


def test_reloads_under_load_fail_no_call_and_mix_no_models(models: Path) -> None:
    images = np.random.default_rng(1).random((40, *IMAGE), np.float32)
    right = run_directly(models / "mnist" / "1", ENCODER, images)[0]
    stop, problems, answers = threading.Event(), [], [0, 0, 0]

    def load(place: int) -> None:
        with Client(server.target, rows_per_call=7) as client:
            while not stop.is_set():
                try:
                    codes = client.encode(images)
                    np.testing.assert_allclose(codes.mean, right, rtol=1e-5, atol=1e-6)
                except Exception as error:  # noqa: BLE001 - told by the test
                    problems.append(error)
                answers[place] += 1

    with running_server(models, watch_s=WATCH_S, versions=3) as server, Client(server.target) as watching:
        callers = [threading.Thread(target=load, args=(place,)) for place in range(3)]
        for caller in callers:
            caller.start()
        try:
            for version in range(2, 14):
                publish(models, version=str(version), digit=f"{version:x}")
                until(lambda version=version: watching.model().version == str(version))  # type: ignore[misc]
                so_far = list(answers)
                until(lambda so_far=so_far: all(map(int.__gt__, answers, so_far)))  # type: ignore[misc]
        finally:
            stop.set()
            for caller in callers:
                caller.join(LIMIT_S)
        page = scrape(server)
    assert not problems
    assert page("vaeserve_reloads_total", result="ok") == 12
    assert page("vaeserve_model_versions") == 3
    assert sum(page.by("code", "vaeserve_calls_total").values()) == page("vaeserve_calls_total", code="OK")


def hup(process: Process, models: Path) -> None:
    """Publish, ask by signal, and see it served; a process without watch would never."""
    with Client(process.target) as client:
        publish(models, version="2", digit="2")
        process.signal(signal.SIGHUP)
        until(lambda: labels(client) == ["mnist/2", "mnist/1"])


def test_sighup_reloads_and_tries_again_what_was_refused(models: Path) -> None:
    damage(publish(models, "faces", "1"))
    with server_process(models, "--watch-s", "0") as process:
        assert process.ready_line.startswith("serving mnist/1 on ")
        hup(process, models)
        process.signal(signal.SIGTERM)
        status, log = process.end()
    assert status == 0
    assert log.count("ERROR model refused model=faces/1 ") == 2
    assert "INFO reload asked for\n" in log
    assert 'INFO models reloaded serving="mnist/2, mnist/1"\n' in log


def test_sighup_reaches_every_worker(models: Path) -> None:
    with supervised(models, "--workers", "2", "--watch-s", "0") as server:
        publish(models, version="2", digit="2")
        server.popen.send_signal(signal.SIGHUP)
        server.until(lambda: server.log.count('INFO models reloaded serving="mnist/2, mnist/1"\n') == 2)
        assert server.end() == 0


def test_at_the_start_what_is_sound_is_served_and_the_rest_named(models: Path) -> None:
    damage(publish(models, version="2", digit="2"))
    with running_server(models) as server, Client(server.target) as client:
        assert labels(client) == ["mnist/1"]
        assert scrape(server)("vaeserve_refused_versions", model="mnist", version="2") == 1
    damage(models / "mnist" / "1")
    with (
        pytest.raises(StartError, match=r"2/decoder\.onnx: its SHA-256 .*; 1 other versions are refused too"),
        running_server(models),
    ):
        pass


class FakeEngine:
    """What the loader knows of an engine."""

    provider, precision, max_rows_per_call, problem = "none", "fp32", 1, ""

    def __init__(self, bundle: Bundle) -> None:
        self.card = bundle.card
        self.label = f"{self.card.name}/{self.card.version}"


def new_loader(models: Path, newest: int = 2) -> Loader:
    return Loader(ModelsFolder(models), Policy(newest), FakeEngine)  # type: ignore[arg-type]


def test_a_version_is_read_only_when_it_has_come_to_rest(models: Path) -> None:
    loader = new_loader(models)
    loader.first()
    whole = publish(models.parent / "elsewhere", version="2", digit="2")
    copy = models / "mnist" / "2"
    copy.mkdir()
    for file in sorted(whole.iterdir()):
        shutil.copy(file, copy)
        assert loader.next() is None
    repository = loader.next()
    assert repository is not None
    assert [engine.label for engine in repository.engines] == ["mnist/2", "mnist/1"]
    assert loader.refusals == 0


def test_a_refusal_is_tried_again_only_when_asked_or_changed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = loading.read_bundle

    def counted(folder: Path, name: str, version: str) -> Bundle:
        reads.append(version)
        return read(folder, name, version)

    monkeypatch.setattr(loading, "read_bundle", counted)
    loader = new_loader(models)
    loader.first()
    damage(publish(models, version="2", digit="2"))
    for _ in range(5):
        assert loader.next() is None
    assert reads == ["1", "2"]
    assert "2/decoder.onnx: its SHA-256 is " in loader.refused[Key("mnist", "2")]
    assert loader.next(again=True) is None
    assert reads == ["1", "2", "2"]
    (models / "mnist" / "2" / "note").touch()
    assert [loader.next() for _ in range(3)] == [None] * 3
    assert reads == ["1", "2", "2", "2"]
    shutil.rmtree(models / "mnist" / "2")
    assert loader.next() is None
    assert not loader.refused


def test_what_an_engine_raises_is_a_refusal_whatever_it_is(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    def out_of_memory(bundle: Bundle) -> FakeEngine:
        if bundle.card.version == "2":
            raise MemoryError("no room")
        return FakeEngine(bundle)

    publish(models, version="2", digit="2")
    loader = Loader(ModelsFolder(models), Policy(1), out_of_memory)  # type: ignore[arg-type]
    assert [engine.label for engine in loader.first().engines] == ["mnist/1"]
    assert loader.refused == {Key("mnist", "2"): "mnist/2 cannot be loaded (MemoryError: no room)"}
    assert [record.message for record in caplog.records] == ["loading failed", "model refused"]


def test_strange_names_are_told_once(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    (models / "not a model").mkdir()
    loader = new_loader(models)
    loader.first()
    for _ in range(3):
        loader.next()
    assert [record.message for record in caplog.records] == ["not a model, left alone"]


def test_a_folder_of_nothing_sound_cannot_be_served(models: Path) -> None:
    damage(models / "mnist" / "1")
    with pytest.raises(BundleError, match=r"1/decoder\.onnx: its SHA-256"):
        new_loader(models).first()
