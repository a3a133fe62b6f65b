"""What a test reads off a server's metrics page."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_LIMIT_S = 20.0


class Page:
    """One scrape: `text` as it came, and the value of every series by its name and its labels' values."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """Return the sum over all series of that name that have these labels."""
        return sum(
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Return the same for each value of `label`."""
        values = {sample.labels[label] for sample in self.samples if sample.name == name}
        return {value: self(name, **labels, **{label: value}) for value in values}


def url(server: Any) -> str:
    """Return the address of a running server's metrics."""
    if hasattr(server, "log"):  # behind Envoy, in a process of its own
        found = re.search(r"metrics url=(\S+)", server.log())
        assert found is not None, server.log()
        return found[1]
    address: str = server.server.metrics_url
    return address


def read(address: str) -> Page:
    """Return the metrics of now."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return Page(answer.read().decode())


def read_until(address: str, holds: Callable[[Page], bool]) -> Page:
    """Return the first page that `holds`: a client may have its answer a moment before the server has counted it."""
    deadline = time.monotonic() + _LIMIT_S
    while not holds(page := read(address)):
        assert time.monotonic() < deadline, page.text
    return page


def scrape(server: Any) -> Page:
    """Return the metrics of a running server."""
    return read(url(server))


def scrape_until(server: Any, holds: Callable[[Page], bool]) -> Page:
    """Return the first page of a running server that `holds`."""
    return read_until(url(server), holds)
