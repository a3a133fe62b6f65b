"""Spans of calls, as a collector gets them: under the caller's own span, with the times that the caller was told."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from bundles import ENCODER, brittle_encoder, slow_encoder, write_bundle
from serving import RunningServer, queued_rows, running_server
from test_lifecycle import ENVIRONMENT, server_process
from test_metrics import HALF_A_SECOND, IMAGE, LATENT, Stub, encode
from vaeserve.v1 import vae_pb2 as pb
from vaeserve_server import tracing

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FROM_CALLER = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"), ("tracestate", "vendor=1"))

Act = Callable[[RunningServer, Stub], None]
Collect = Callable[[Act], list[Any]]


@pytest.fixture
def collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collect:
    """Serve while something is done, and return its spans by their start, a call's own first."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "OTLPSpanExporter", lambda: exporter)
    write_bundle(tmp_path, "mnist", image_shape=IMAGE, latent_shape=LATENT, prior=True)
    write_bundle(
        tmp_path, "slow", image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: slow_encoder(IMAGE, LATENT)}
    )
    write_bundle(
        tmp_path, "brittle", image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: brittle_encoder(IMAGE, LATENT)}
    )

    def during(act: Act) -> list[ReadableSpan]:
        with (
            running_server(tmp_path, traces=True, threads=1) as server,
            grpc.insecure_channel(server.target) as channel,
        ):
            act(server, Stub(channel))
        return sorted(exporter.get_finished_spans(), key=lambda span: (span.start_time, span.kind != SpanKind.SERVER))

    return during


def of(model: str, request: pb.EncodeRequest) -> pb.EncodeRequest:
    request.model.name = model
    return request


@pytest.mark.in_process
def test_call_queue_and_run_are_spans_under_the_callers_own(collect: Collect) -> None:
    told: dict[str, str] = {}

    def act(server: RunningServer, stub: Stub) -> None:
        told.update(stub.Encode.with_call(of("mnist", encode(5)), metadata=FROM_CALLER)[1].trailing_metadata())

    whole, queue, run = collect(act)
    assert (whole.name, queue.name, run.name) == ("vaeserve.v1.VaeService/Encode", "queue", "run")
    assert whole.kind == SpanKind.SERVER
    assert f"{whole.context.trace_id:032x}" == TRACE_ID
    assert f"{whole.parent.span_id:016x}" == PARENT_ID
    assert whole.context.trace_state["vendor"] == "1"
    assert {queue.parent.span_id, run.parent.span_id} == {whole.context.span_id}
    assert whole.attributes["rpc.response.status_code"] == "OK"
    assert whole.attributes["vaeserve.call_id"] == told["vaeserve-call-id"]
    assert whole.status.status_code == StatusCode.UNSET
    assert whole.resource.attributes["service.name"] == "vaeserve"
    expected = {"vaeserve.model": "mnist", "vaeserve.version": "1", "vaeserve.graph": "encoder", "vaeserve.rows": 5}
    assert dict(queue.attributes) == expected
    assert dict(run.attributes) == {**expected, "vaeserve.batch_rows": 5}
    assert whole.start_time <= queue.start_time <= queue.end_time == run.start_time < run.end_time <= whole.end_time
    assert (queue.end_time - queue.start_time) / 1000 == pytest.approx(int(told["vaeserve-queue-us"]), abs=2)


@pytest.mark.in_process
def test_a_call_without_a_span_of_its_own_begins_a_trace(collect: Collect) -> None:
    def act(server: RunningServer, stub: Stub) -> None:
        stub.ListModels(pb.ListModelsRequest())
        stub.Encode(of("mnist", encode()), metadata=(("traceparent", "nonsense"),))

    listed, encoded, *within = collect(act)
    assert listed.parent is None
    assert encoded.parent is None
    assert listed.context.trace_id != encoded.context.trace_id
    assert {span.context.trace_id for span in within} == {encoded.context.trace_id}


@pytest.mark.in_process
def test_a_call_through_two_graphs_has_a_wait_and_a_run_for_each(collect: Collect) -> None:
    def act(server: RunningServer, stub: Stub) -> None:
        stub.Sample(pb.SampleRequest(model=pb.ModelRef(name="mnist"), count=2, prior=pb.PRIOR_FITTED))

    _, *within = collect(act)
    ways = [(span.name, span.attributes["vaeserve.graph"]) for span in within]
    assert ways == [("queue", "prior"), ("run", "prior"), ("queue", "decoder"), ("run", "decoder")]


@pytest.mark.in_process
def test_a_call_that_is_cancelled_in_the_queue_has_no_run(collect: Collect) -> None:
    def act(server: RunningServer, stub: Stub) -> None:
        busy = stub.Encode.future(of("slow", encode(pixel=HALF_A_SECOND)))
        server.until(lambda running: running.models.pool._free == 0)
        waiting = stub.Encode.future(of("slow", encode(7)), metadata=FROM_CALLER)
        server.until(lambda running: queued_rows(running) == 7)
        waiting.cancel()
        server.until(lambda running: queued_rows(running) == 0)
        busy.result()

    cancelled, queue = [span for span in collect(act) if f"{span.context.trace_id:032x}" == TRACE_ID]
    assert (cancelled.attributes["rpc.response.status_code"], queue.name) == ("CANCELLED", "queue")
    assert cancelled.status.status_code == StatusCode.UNSET  # the caller's own wish


@pytest.mark.in_process
def test_only_a_fault_of_the_server_is_an_error(collect: Collect) -> None:
    def act(server: RunningServer, stub: Stub) -> None:
        for request in (of("mnist", pb.EncodeRequest()), of("brittle", encode(pixel=1.0))):
            with pytest.raises(grpc.RpcError):
                stub.Encode(request)

    spans = [span for span in collect(act) if span.kind == SpanKind.SERVER]
    refused, failed = spans
    assert (refused.attributes["rpc.response.status_code"], refused.status.status_code) == (
        "INVALID_ARGUMENT",
        StatusCode.UNSET,
    )
    assert (failed.attributes["error.type"], failed.status.status_code) == ("INTERNAL", StatusCode.ERROR)


@pytest.mark.in_process
def test_the_environment_names_the_service(collect: Collect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "faces")
    (span,) = collect(lambda server, stub: stub.ListModels(pb.ListModelsRequest()))
    assert span.resource.attributes["service.name"] == "faces"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """An OpenTelemetry collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def test_a_collector_gets_the_spans_before_the_server_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path, "mnist", image_shape=IMAGE, latent_shape=LATENT)
    collector, service = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, service)
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    monkeypatch.setitem(ENVIRONMENT, "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    with server_process(tmp_path, "--traces") as process, grpc.insecure_channel(process.target) as channel:
        _, call = Stub(channel).Encode.with_call(encode(), metadata=FROM_CALLER)
        told = dict(call.trailing_metadata())
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0
    service.stop(None).wait()
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    named = {span.name: span for span in collector.spans}
    assert named.keys() == {"vaeserve.v1.VaeService/Encode", "queue", "run"}
    whole = named["vaeserve.v1.VaeService/Encode"]
    assert whole.parent_span_id.hex() == PARENT_ID
    assert {named["queue"].parent_span_id, named["run"].parent_span_id} == {whole.span_id}
    attributes = {each.key: each.value.string_value for each in whole.attributes}
    assert attributes["vaeserve.call_id"] == told["vaeserve-call-id"]
    assert attributes["rpc.response.status_code"] == "OK"
    assert len(collector.spans) == 3


def test_a_missing_extra_is_told_in_one_line(tmp_path: Path) -> None:
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT)
    program = (
        "import sys; sys.modules['opentelemetry'] = None; from vaeserve_server.__main__ import main; sys.exit(main())"
    )
    flags = ["--models", str(tmp_path), "--device", "cpu", "--port", "0", "--metrics-port", "0", "--traces"]
    command = [sys.executable, "-c", program, *flags]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert re.search(r'cannot start: --traces needs opentelemetry[.\w]*; pip install "vaeserve\[otel\]"$', line)


def test_without_traces_nothing_of_them_is_loaded() -> None:
    program = "import sys, vaeserve_server.start; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert not [name for name in loaded.stdout.split() if name.startswith("opentelemetry")]
