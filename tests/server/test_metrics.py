"""The metrics page: every call is in it once, whatever became of it, and no image or code ever is."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import metrics_page
from bundles import DIGEST, ENCODER, brittle_encoder, slow_encoder, write_bundle
from metrics_page import Page, scrape, scrape_until
from serving import RunningServer, queued_rows, running_server
from vaeserve import Client, tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import metrics_http
from vaeserve_server.errors import ListenError
from vaeserve_server.latent_health import STEP_ROWS
from vaeserve_server.metrics_http import MetricsEndpoint
from vaeserve_server.stats import DURATION_BOUNDS_S, ROW_BOUNDS

Stub = vae_pb2_grpc.VaeServiceStub
IMAGE, LATENT = (1, 4, 4), (3,)
HALF_A_SECOND = 0.01
RPCS = {"Encode", "Decode", "Sample", "GetModel", "ListModels"}
ENVOY_REFUSES = "any"  # the RPC of calls that Envoy refused before they came to one


def zeros(server: RunningServer) -> dict[str, int]:
    """Return none for each RPC that a server counts."""
    return dict.fromkeys(RPCS | ({ENVOY_REFUSES} if server.settings.transport == "envoy" else set()), 0)


def encode(rows: int = 1, pixel: float = 0.0) -> pb.EncodeRequest:
    return pb.EncodeRequest(images=tensors.to_tensor(np.full((rows, *IMAGE), pixel, np.float32)))


def decode(rows: int) -> pb.DecodeRequest:
    return pb.DecodeRequest(latents=tensors.to_tensor(np.zeros((rows, *LATENT), np.float32)))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """A server with one thread, whose encoder takes a minute times the brightest pixel."""
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: slow_encoder(IMAGE, LATENT)})
    with running_server(tmp_path, threads=1, max_queue_rows=500, max_batch_rows=64, drain_s=0) as running:
        yield running


@pytest.fixture
def stub(server: RunningServer) -> Iterator[Stub]:
    with grpc.insecure_channel(server.target) as channel:
        yield Stub(channel)


def test_every_call_is_counted_once_whatever_became_of_it(server: RunningServer, stub: Stub) -> None:
    busy = stub.Encode.future(encode(pixel=3 * HALF_A_SECOND))
    server.until(lambda running: running.models.pool._free == 0)
    cancelled = [stub.Encode.future(encode(3)) for _ in range(11)]
    queued = [stub.Encode.future(encode(5)) for _ in range(13)]
    server.until(lambda running: queued_rows(running) == 11 * 3 + 13 * 5)
    for call in cancelled:
        call.cancel()
    expiring = [stub.Encode.future(encode(2), timeout=0.1) for _ in range(7)]
    for call in expiring:
        assert isinstance(call.exception(), grpc.RpcError)
    refused = [stub.Encode.future(encode(501)) for _ in range(17)]
    wrong = [stub.Decode.future(pb.DecodeRequest()) for _ in range(19)]
    missing = [stub.GetModel.future(pb.GetModelRequest(model=pb.ModelRef(name="nobody"))) for _ in range(23)]
    sampled = [stub.Sample.future(pb.SampleRequest(count=4)) for _ in range(29)]
    decoded = [stub.Decode.future(decode(6)) for _ in range(31)]
    everything = [busy, *expiring, *cancelled, *queued, *refused, *wrong, *missing, *sampled, *decoded]
    for call in everything:
        call.exception() if not call.cancelled() else None
    page = scrape_until(server, lambda page: page("vaeserve_calls_total") == len(everything))

    counted = {
        (rpc, code): page("vaeserve_calls_total", rpc=rpc, code=code)
        for rpc in RPCS
        for code in page.by("code", "vaeserve_calls_total")
        if page("vaeserve_calls_total", rpc=rpc, code=code)
    }
    assert counted == {
        ("Encode", "OK"): 1 + 13,
        ("Encode", "DEADLINE_EXCEEDED"): 7,
        ("Encode", "CANCELLED"): 11,
        ("Encode", "RESOURCE_EXHAUSTED"): 17,
        ("Decode", "INVALID_ARGUMENT"): 19,
        ("Decode", "OK"): 31,
        ("GetModel", "NOT_FOUND"): 23,
        ("Sample", "OK"): 29,
    }
    for name, rpc, count in (("expired", "Encode", 7), ("cancelled", "Encode", 11), ("refused", "Encode", 17)):
        assert page.by("rpc", f"vaeserve_{name}_total") == {**zeros(server), rpc: count}
    assert page.by("rpc", "vaeserve_rows_total") == {"Encode": 1 + 13 * 5, "Sample": 29 * 4, "Decode": 31 * 6}
    assert page.by("rpc", "vaeserve_call_duration_seconds_count") == page.by("rpc", "vaeserve_calls_total")

    assert page("vaeserve_queue_rows") == 0
    for graph, calls, rows in (("encoder", 14, 66), ("decoder", 60, 302)):
        assert page("vaeserve_queue_duration_seconds_count", graph=graph) == calls
        assert page("vaeserve_batch_rows_sum", graph=graph) == rows
        runs = page("vaeserve_batch_rows_count", graph=graph)
        assert 1 < runs <= calls
        assert page("vaeserve_compute_duration_seconds_count", graph=graph) == runs
    assert page("vaeserve_compute_duration_seconds_sum", graph="encoder") > 0.1
    assert page("vaeserve_queue_duration_seconds_sum", graph="encoder") > 13 * 0.1  # all waited for the slow one


def test_waiting_rows_are_seen_while_they_wait(server: RunningServer, stub: Stub) -> None:
    busy = stub.Encode.future(encode(pixel=HALF_A_SECOND))
    server.until(lambda running: running.models.pool._free == 0)
    waiting = stub.Encode.future(encode(9))
    server.until(lambda running: queued_rows(running) == 9)
    assert scrape(server).by("graph", "vaeserve_queue_rows") == {"encoder": 9, "decoder": 0}
    assert (len(busy.result().mean.shape), waiting.result().mean.shape[0]) == (2, 9)


def test_a_call_in_pieces_waits_once_and_its_rows_are_counted_once(server: RunningServer, stub: Stub) -> None:
    assert stub.Decode(decode(200)).images.shape[0] == 200
    page = scrape_until(server, lambda page: page("vaeserve_calls_total") == 1)
    assert page("vaeserve_queue_duration_seconds_count") == 1
    assert page("vaeserve_rows_total") == page("vaeserve_batch_rows_sum") == 200
    assert page("vaeserve_batch_rows_count") >= 4  # of at most 64 rows
    assert page("vaeserve_batch_rows_bucket", le="32.0") < page("vaeserve_batch_rows_bucket", le="64.0")


def test_a_fault_of_the_server_is_counted_as_one(tmp_path: Path) -> None:
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: brittle_encoder(IMAGE, LATENT)})
    with running_server(tmp_path) as server, grpc.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.RpcError):
            Stub(channel).Encode(encode(pixel=1.0))
        page = scrape_until(server, lambda page: page("vaeserve_calls_total") == 1)
    assert page("vaeserve_calls_total", rpc="Encode", code="INTERNAL") == 1
    assert page("vaeserve_rows_total") == 0


def test_what_is_served_and_where_it_runs(server: RunningServer) -> None:
    page = scrape(server)
    assert page("vaeserve_model_versions", model="mnist") == 1
    assert page("vaeserve_model_info", model="mnist", version="1", digest=DIGEST) == 1
    where = {"provider": "CPUExecutionProvider", "requested_device": "cpu"}
    assert page("vaeserve_provider_info", model="mnist", version="1", **where) == 1
    assert page("vaeserve_fell_back_to_cpu") == 0
    assert page("vaeserve_build_info") == 1
    assert page("process_resident_memory_bytes") > 20e6


def test_alerts_have_their_zeros_before_the_first_call(server: RunningServer) -> None:
    page = scrape(server)
    for name in ("refused", "cancelled", "expired"):
        assert page.by("rpc", f"vaeserve_{name}_total") == zeros(server)
    assert page.by("rpc", "vaeserve_calls_total", code="OK") == zeros(server)
    assert page.by("result", "vaeserve_reloads_total") == {"ok": 0, "failed": 0}


def test_buckets_begin_at_15_us_and_cover_every_batch(server: RunningServer) -> None:
    assert DURATION_BOUNDS_S[0] == 15e-6
    assert DURATION_BOUNDS_S[-1] > 5
    assert (ROW_BOUNDS[0], ROW_BOUNDS[-1]) == (1, 4096)
    page = scrape(server)
    bounds = {sample.labels["le"] for sample in page.samples if sample.name == "vaeserve_call_duration_seconds_bucket"}
    assert bounds == {*map(str, DURATION_BOUNDS_S), "+Inf"}


def test_what_callers_send_makes_no_series(server: RunningServer, stub: Stub) -> None:
    def series(page: Page) -> set[tuple[str, ...]]:
        return {(sample.name, *sorted(sample.labels.values())) for sample in page.samples}

    def calls() -> None:
        for name in ("secret", "mnist"):
            for version in ("1", "77"):
                with pytest.raises(grpc.RpcError):
                    stub.Decode(pb.DecodeRequest(model=pb.ModelRef(name=name, version=version)))

    calls()
    before = scrape_until(server, lambda page: page("vaeserve_calls_total") == 4)
    for _ in range(5):
        calls()
    after = scrape_until(server, lambda page: page("vaeserve_calls_total") == 24)
    assert series(after) == series(before)
    assert "secret" not in after.text
    labels = {label for sample in after.samples for label in sample.labels}
    assert labels <= {
        *("rpc", "code", "model", "version", "graph", "latent", "digest", "provider", "requested_device"),
        *("result", "le"),
    }


def test_no_image_and_no_code_can_be_read_off_the_page(
    evaluated_models_dir: Path, test_images: NDArray[np.uint8]
) -> None:
    with running_server(evaluated_models_dir) as server, Client(server.target) as client:
        codes = client.encode(test_images[: STEP_ROWS - 1])
        few = scrape_until(server, lambda page: page("vaeserve_latent_rows_total") == STEP_ROWS - 1)
        assert not few.by("latent", "vaeserve_latent_mean")
        codes = client.encode(test_images[STEP_ROWS - 1 : STEP_ROWS])
        enough = scrape_until(server, lambda page: page("vaeserve_latent_rows_total") == STEP_ROWS)
        running = enough.by("latent", "vaeserve_latent_mean")
        assert len(running) == codes.mean.shape[1]
        client.encode(test_images[STEP_ROWS : STEP_ROWS + 1])
        one_more = scrape_until(server, lambda page: page("vaeserve_latent_rows_total") == STEP_ROWS + 1)
        assert one_more.by("latent", "vaeserve_latent_mean") == running


def test_drift_is_nothing_on_known_images_and_plain_on_others(
    evaluated_models_dir: Path, test_images: NDArray[np.uint8]
) -> None:
    drift, means, variances, kl_nats = {}, {}, {}, {}
    for name, images in {"the same": test_images, "inverted": 255 - test_images}.items():
        with running_server(evaluated_models_dir) as server, Client(server.target) as client:
            codes = client.encode(images)
            page = scrape_until(server, lambda page: page("vaeserve_latent_rows_total") == len(test_images))
        drift[name] = page.by("latent", "vaeserve_latent_drift_nats")
        means[name] = page.by("latent", "vaeserve_latent_mean")
        variances[name] = page.by("latent", "vaeserve_latent_variance")
        kl_nats[name] = page.by("latent", "vaeserve_latent_kl_nats")
        posterior_variance = codes.stddev.astype(np.float64) ** 2
        expected = codes.mean.var(axis=0, dtype=np.float64) + posterior_variance.mean(axis=0)
        divergence = ((codes.mean**2 + posterior_variance - 1) / 2 - np.log(codes.stddev)).mean(axis=0)
        for latent in range(codes.mean.shape[1]):
            # Runs of one call are weighted as they came, not quite equally.
            assert means[name][str(latent)] == pytest.approx(codes.mean[:, latent].mean(), abs=0.05)
            assert variances[name][str(latent)] == pytest.approx(expected[latent], rel=0.1)
            assert kl_nats[name][str(latent)] == pytest.approx(divergence[latent], rel=0.1, abs=0.02)
    assert max(drift["the same"].values()) < 0.01
    assert max(drift["inverted"].values()) > 0.5  # what alerts.yml waits for


def test_metrics_can_be_switched_off(tmp_path: Path) -> None:
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT)
    with running_server(tmp_path, metrics=False, transport="grpc") as server:
        assert server.server.metrics_url == ""
        with grpc.insecure_channel(server.target) as channel:
            assert Stub(channel).Encode(encode()).mean.shape == [1, 3]


def test_only_the_page_is_there(server: RunningServer) -> None:
    address = metrics_page.url(server)
    for path in ("/", "/metrics/", "/other"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(address.removesuffix("/metrics") + path, timeout=10)
        with refusal.value as answer:
            assert answer.code == 404
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(address, data=b"{}", timeout=10)
    with refusal.value as answer:
        assert answer.code == 501


def test_a_scrape_waits_for_no_other(server: RunningServer) -> None:
    """A scraper that says nothing holds nobody up."""
    where = urllib.parse.urlsplit(metrics_page.url(server))
    assert where.hostname is not None
    with contextlib.closing(http.client.HTTPConnection(where.hostname, where.port)) as silent:
        silent.connect()
        with ThreadPoolExecutor(4) as pool:
            pages = list(pool.map(lambda _: scrape(server), range(8)))
    assert all(page("vaeserve_build_info") == 1 for page in pages)


def test_scrapers_that_never_come_to_an_end_are_few_and_cut_off(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_http, "_SLOWEST_S", 0.5)
    page = MetricsEndpoint("127.0.0.1", 0, lambda: b"page")
    address = ("127.0.0.1", page.port)
    try:
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(socket.create_connection(address, 20)) for _ in range(100)]
            assert sum(thread.name.startswith("Thread-") for thread in threading.enumerate()) < 2 * 40
            dribbling = crowd[0]
            with pytest.raises(ConnectionError):
                for byte in b"GET /metrics?" + b"x" * 1000:
                    dribbling.send(bytes([byte]))
                    time.sleep(0.02)
            for each in crowd[1:]:
                with contextlib.suppress(ConnectionError):
                    assert each.recv(1) == b""
            with urllib.request.urlopen(page.url, timeout=20) as answer:
                assert answer.read() == b"page"
    finally:
        page.close()
    assert capfd.readouterr().err == ""


def test_a_taken_port_is_told_with_what_to_do() -> None:
    first = MetricsEndpoint("127.0.0.1", 0, lambda: b"")
    try:
        with pytest.raises(ListenError, match=r"for metrics: Address already in use; .*--metrics-port"):
            MetricsEndpoint("127.0.0.1", first.port, lambda: b"")
    finally:
        first.close()


@pytest.mark.parametrize("transport", ["grpc", "envoy"])
def test_times_are_finer_than_a_millisecond(tmp_path: Path, transport: str) -> None:
    """uvloop, behind Envoy, tells the time in whole milliseconds; calls and queues take microseconds."""
    if transport == "envoy":
        pytest.importorskip("pyvoy")
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT)
    with running_server(tmp_path, transport=transport) as server, grpc.insecure_channel(server.target) as channel:
        for _ in range(5):
            Stub(channel).Decode(decode(1))
        page = scrape_until(server, lambda page: page("vaeserve_call_duration_seconds_count", rpc="Decode") == 5)
    for name in ("vaeserve_call_duration_seconds_sum", "vaeserve_queue_duration_seconds_sum"):
        total_ms = page(name) * 1000
        assert abs(total_ms - round(total_ms)) > 1e-6, name
