"""One metrics page for several workers: theirs, each series under the place of its worker.

What is right for one figure (a sum, a maximum, a quantile over all buckets) is wrong for another; so nothing is added
up here, and Prometheus does that by its queries.
"""

from __future__ import annotations

import http.client
import logging
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "worker"
_PATIENCE_S = 2.0
_MOST_AT_ONCE = 16

_log = logging.getLogger(__name__)


class MergedPages(Collector):
    """The pages that `urls` returns by the place of their worker; whoever does not answer is left out."""

    def __init__(self, urls: Callable[[], Mapping[int, str]]) -> None:
        self._urls = urls
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """Return Prometheus' text format. Waits for workers, 2 s at most."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Return nothing: the registry is to ask only when it is asked."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of every worker, and how many workers answered."""
        urls = self._urls()
        with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
            pages = dict(zip(urls, pool.map(_fetch, urls.values()), strict=True))
        answered = {place: page for place, page in pages.items() if page is not None}
        yield GaugeMetricFamily("vaeserve_workers", "Workers that answer.", len(answered))
        merged: dict[str, Metric] = {}
        for place, page in answered.items():
            for family in text_string_to_metric_families(page):
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.add_sample(sample.name, {**sample.labels, LABEL: str(place)}, sample.value)
        yield from merged.values()


def _fetch(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer:
            text: str = answer.read().decode()
            return text
    except (OSError, http.client.HTTPException) as error:  # it has just died; its supervisor sees to that
        _log.warning("a worker's metrics are missing", extra={"fields": {"url": url, "reason": str(error)}})
        return None
