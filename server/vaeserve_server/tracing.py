"""OpenTelemetry spans of each call: the call, its wait in a queue, and the run that computed its rows.

Spans are made once the call is over, from the times that are kept of it anyway, so tracing has no part in answering.
Where they go, how many are kept and what the service is called are OpenTelemetry's own OTEL_* variables. Needs the
extra `otel`; nothing else imports this module unless traces are wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from threading import Timer

from google.rpc import code_pb2
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vaeserve_server.calls import EndedCall, ReadMetadata
from vaeserve_server.stats import Passage

_EpochNs = Callable[[float], int]

_LAST_SPANS_S = 2.0
_W3C_KEYS = {"traceparent", "tracestate"}
# Those for which OpenTelemetry's conventions for gRPC blame the server; the others are the caller's own.
_SERVER_FAULTS = {
    code_pb2.UNKNOWN,
    code_pb2.DEADLINE_EXCEEDED,
    code_pb2.UNIMPLEMENTED,
    code_pb2.INTERNAL,
    code_pb2.UNAVAILABLE,
    code_pb2.DATA_LOSS,
}


class CallTracer:
    """Sends the spans of calls to a collector, by OTLP over gRPC."""

    def __init__(self) -> None:
        resource = Resource.create({"service.name": "vaeserve", "service.version": version("vaeserve")})
        # What the user says of the service in the environment goes before our own words.
        self._provider = TracerProvider(resource=resource.merge(OTELResourceDetector().detect()))
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer(__name__)
        self._propagator = TraceContextTextMapPropagator()

    def trace(self, call: EndedCall, read_metadata: ReadMetadata) -> None:
        """Make the spans of a call that is over, as children of its caller's span if it sent one."""
        carrier = {key: value for key, value in read_metadata() or () if key in _W3C_KEYS}
        epoch_ns = self._epoch()
        method = f"{call.service}/{call.rpc}"
        code = code_pb2.Code.Name(call.code)
        span = self._tracer.start_span(
            method,
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {
                "rpc.system.name": "grpc",
                "rpc.method": method,
                "rpc.response.status_code": code,
                "vaeserve.call_id": call.call_id,
            },
            start_time=epoch_ns(call.started),
        )
        if span.is_recording():
            if call.code in _SERVER_FAULTS:
                span.set_attribute("error.type", code)
                span.set_status(Status(StatusCode.ERROR))
            within = set_span_in_context(span)
            for passage in call.passages:
                self._trace_passage(passage, within, call.ended, epoch_ns)
        span.end(epoch_ns(call.ended))

    def close(self) -> None:
        """Send what is left, if there is somebody to take it at once. Call it off the event loop."""
        give_up = Timer(_LAST_SPANS_S, self._exporter.shutdown)  # or it tries again, for ten seconds
        give_up.start()
        self._provider.shutdown()
        give_up.cancel()

    def _trace_passage(self, passage: Passage, within: Context, call_ended: float, epoch_ns: _EpochNs) -> None:
        attributes: dict[str, str | int] = {
            "vaeserve.model": passage.graph.model,
            "vaeserve.version": passage.graph.version,
            "vaeserve.graph": passage.graph.graph,
            "vaeserve.rows": passage.rows,
        }
        started = passage.started or call_ended
        queue = self._tracer.start_span("queue", within, attributes=attributes, start_time=epoch_ns(passage.submitted))
        queue.end(epoch_ns(started))
        if passage.started:
            run = self._tracer.start_span("run", within, attributes=attributes, start_time=epoch_ns(started))
            run.set_attribute("vaeserve.batch_rows", passage.batch_rows)
            run.end(epoch_ns(passage.ended or call_ended))

    def _epoch(self) -> _EpochNs:
        """Return what turns time.monotonic() into nanoseconds since 1970, as the clocks stand now."""
        zero_ns = time.time_ns() - int(time.monotonic() * 1e9)
        return lambda loop_s: zero_ns + int(loop_s * 1e9)
