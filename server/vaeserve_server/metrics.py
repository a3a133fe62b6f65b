"""The server's figures as Prometheus reads them. Nothing is computed here before somebody asks.

What counts is in stats.py and latent_health.py; this reads it when scraped, so a call pays nothing for a metric's name,
labels or locks. Every label has a bounded set of values, none of which a caller chooses.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from math import inf
from typing import Protocol

from google.rpc import code_pb2
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from vaeserve.v1 import vae_pb2
from vaeserve_server.engine import Engine
from vaeserve_server.latent_health import drift_nats
from vaeserve_server.models_folder import Key
from vaeserve_server.service import VaeService
from vaeserve_server.stats import Histogram, MethodStats

_MODEL = ("model", "version")
_GRAPH = (*_MODEL, "graph")
_LATENT = (*_MODEL, "latent")

_Served = Sequence[tuple[Engine, vae_pb2.Serving]]


class Watch(Protocol):
    """What the watch over the models folder tells."""

    @property
    def reloads(self) -> Mapping[str, int]:
        """Counts by result: `ok` changed what is served, `failed` refused a version or could not look."""

    def refused(self) -> Iterable[Key]:
        """Return the versions that lie in the folder now, should be served and are unsound."""


class Metrics(Collector):
    """Every figure of one server; to be made on its event loop."""

    def __init__(self, service: VaeService, methods: Callable[[], Sequence[MethodStats]], watch: Watch) -> None:
        self._service = service
        self._methods = methods
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """Return Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the registry is to ask only when it is asked."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its values of now."""
        yield InfoMetricFamily("vaeserve_build", "Version of vaeserve.", {"version": version("vaeserve")})
        yield from _calls(self._methods())
        with contextlib.suppress(RuntimeError):  # tasks came and went faster than they could be counted
            tasks = len(asyncio.all_tasks(self._loop))
            yield GaugeMetricFamily("vaeserve_event_loop_tasks", "Tasks of the event loop now.", tasks)
        yield from _reloads(self._watch)
        served = self._service.served()
        yield from _models(served)
        yield from _graphs(served)
        yield from _latents(served)


def _calls(methods: Sequence[MethodStats]) -> Iterator[Metric]:
    calls = CounterMetricFamily("vaeserve_calls", "Finished calls by status code.", labels=["rpc", "code"])
    started = CounterMetricFamily("vaeserve_calls_started", "Calls that were taken in.", labels=["rpc"])
    in_flight = GaugeMetricFamily("vaeserve_calls_in_flight", "Calls that have not ended yet.", labels=["rpc"])
    refused = CounterMetricFamily("vaeserve_refused", "Calls refused: full queue, or too many in hand.", labels=["rpc"])
    cancelled = CounterMetricFamily("vaeserve_cancelled", "Calls cancelled by the caller.", labels=["rpc"])
    expired = CounterMetricFamily("vaeserve_expired", "Calls whose deadline passed.", labels=["rpc"])
    duration = HistogramMetricFamily(
        "vaeserve_call_duration_seconds", "Time from a call's request to its answer, inside the server.", labels=["rpc"]
    )
    for method in methods:
        codes = list(method.codes)  # before those that started, so that none has ended before it began
        began = method.started
        started.add_metric([method.rpc], began)
        in_flight.add_metric([method.rpc], began - sum(codes))
        for code, count in enumerate(codes):
            if count or code == code_pb2.OK:
                calls.add_metric([method.rpc, code_pb2.Code.Name(code)], count)
        refused.add_metric([method.rpc], method.refused)
        cancelled.add_metric([method.rpc], codes[code_pb2.CANCELLED])
        expired.add_metric([method.rpc], codes[code_pb2.DEADLINE_EXCEEDED])
        _add(duration, [method.rpc], method.duration_s)
    return iter((calls, started, in_flight, refused, cancelled, expired, duration))


def _reloads(watch: Watch) -> Iterator[Metric]:
    reloads = CounterMetricFamily(
        "vaeserve_reloads",
        "Changes of the models folder that were taken over (ok), versions refused and looks that failed (failed).",
        labels=["result"],
    )
    for result, count in watch.reloads.items():
        reloads.add_metric([result], count)
    refused = GaugeMetricFamily("vaeserve_refused_versions", "1 for what lies there unsound, unserved.", labels=_MODEL)
    for key in watch.refused():
        refused.add_metric(list(key), 1)
    return iter((reloads, refused))


def _models(served: _Served) -> Iterator[Metric]:
    versions = GaugeMetricFamily("vaeserve_model_versions", "Versions loaded now.", labels=["model"])
    names = [engine.card.name for engine, _ in served]
    for name in sorted(set(names)):
        versions.add_metric([name], names.count(name))
    yield versions
    info = InfoMetricFamily("vaeserve_model", "What is served.", labels=_MODEL)
    able = GaugeMetricFamily(
        "vaeserve_model_serving", "0 where calls are refused because runs fail or do not end.", labels=_MODEL
    )
    provider = InfoMetricFamily("vaeserve_provider", "What really runs the graphs.", labels=_MODEL)
    fell_back = GaugeMetricFamily(
        "vaeserve_fell_back_to_cpu", "1 where a GPU was wanted and could not be used.", labels=_MODEL
    )
    for engine, serving in served:
        labels = _labels(engine)
        info.add_metric(labels, {"digest": engine.card.digest})
        able.add_metric(labels, float(not engine.problem))
        requested = {"provider": serving.provider, "requested_device": serving.requested_device}
        provider.add_metric(labels, requested)
        fell_back.add_metric(labels, float(serving.fell_back_to_cpu))
    yield from (info, able, provider, fell_back)


def _graphs(served: _Served) -> Iterator[Metric]:
    rows = CounterMetricFamily("vaeserve_rows", "Rows of calls that were answered.", labels=["rpc", *_MODEL])
    waiting = GaugeMetricFamily("vaeserve_queue_rows", "Rows waiting for a run now.", labels=_GRAPH)
    queue = HistogramMetricFamily(
        "vaeserve_queue_duration_seconds", "Wait of a call until its first rows are run.", labels=_GRAPH
    )
    compute = HistogramMetricFamily("vaeserve_compute_duration_seconds", "One run of a graph.", labels=_GRAPH)
    batch = HistogramMetricFamily("vaeserve_batch_rows", "Rows of one run of a graph.", labels=_GRAPH)
    for engine, _ in served:
        by_rpc: dict[str, int] = {}
        for stats, queued_rows in engine.graph_stats():
            labels = [*_labels(engine), stats.graph]
            waiting.add_metric(labels, queued_rows)
            _add(queue, labels, stats.queue_s)
            _add(compute, labels, stats.compute_s)
            _add(batch, labels, stats.batch_rows)
            for rpc, count in stats.rows_by_rpc.copy().items():
                by_rpc[rpc] = by_rpc.get(rpc, 0) + count
        for rpc, count in by_rpc.items():
            rows.add_metric([rpc, *_labels(engine)], count)
    return iter((rows, waiting, queue, compute, batch))


def _latents(served: _Served) -> Iterator[Metric]:
    seen = CounterMetricFamily("vaeserve_latent_rows", "Rows in the latent figures since the start.", labels=_MODEL)
    gauges = {
        name: GaugeMetricFamily(f"vaeserve_latent_{name}", what, labels=_LATENT)
        for name, what in {
            "mean": "Running mean of the posterior mean.",
            "variance": "Running variance of the aggregate posterior.",
            "kl_nats": "Running mean of KL(posterior || N(0, 1)).",
            "training_mean": "Mean of the posterior mean on the model's test images.",
            "training_variance": "Variance of the aggregate posterior on the model's test images.",
            "training_kl_nats": "Mean of KL(posterior || N(0, 1)) on the model's test images.",
            "drift_nats": "KL(running || training), each latent's aggregate posterior taken as normal.",
        }.items()
    }
    for engine, _ in served:
        health, labels = engine.latent_health, _labels(engine)
        running, training = health.running(), health.training
        seen.add_metric(labels, health.rows)
        columns = dict(running._asdict()) if running else {}
        columns |= {f"training_{name}": column for name, column in training._asdict().items()} if training else {}
        columns |= {"drift_nats": drift_nats(running, training)} if running and training else {}
        for name, column in columns.items():
            for latent, value in zip(health.watched, column.tolist(), strict=True):
                gauges[name].add_metric([*labels, str(latent)], value)
    return iter((seen, *gauges.values()))


def _labels(engine: Engine) -> list[str]:
    return [engine.card.name, engine.card.version]


def _add(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    total, below, buckets = histogram.total, 0, []
    for bound, count in zip([*histogram.bounds, inf], histogram.counts.copy(), strict=True):
        below += count
        buckets.append((str(float(bound)) if bound < inf else "+Inf", below))
    family.add_metric(labels, buckets, total)
