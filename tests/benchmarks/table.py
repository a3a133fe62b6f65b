"""Measured values of several rounds -> medians and ratios: printed for people, written as JSON for programs.

A ratio is taken within a round, between two measurements that stood beside each other, and the median of the rounds'
ratios is what counts: what slows the whole machine for a while slows both sides.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Key = tuple[str, str]
"""A workload, and the transport it went over."""


class Bound(NamedTuple):
    """What a ratio should reach."""

    word: str  # ">=" or "<="
    ratio: float

    def is_met(self, ratio: float) -> bool:
        """Return whether `ratio` reaches it."""
        return ratio >= self.ratio if self.word == ">=" else ratio <= self.ratio

    def __str__(self) -> str:
        return f"{self.word} {self.ratio:g}"


class Measured(NamedTuple):
    """One value of one round. `baseline` is what it is divided by; `cpu_share` is the load generator's, of one core."""

    workload: str
    transport: str
    value: float
    unit: str
    baseline: Key | None = None
    bound: Bound | None = None
    cpu_share: float | None = None
    note: str = ""


@dataclass
class _Row:
    first: Measured
    values: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    cpu_shares: list[float] = field(default_factory=list)


class Table:
    """Rows in the order in which they were first measured."""

    def __init__(self) -> None:
        self._rows: dict[Key, _Row] = {}

    def add_round(self, measured: Iterable[Measured]) -> None:
        """Add the values of one round; ratios are of values within it."""
        values: dict[Key, float] = {}
        for each in measured:
            key = (each.workload, each.transport)
            values[key] = each.value
            row = self._rows.setdefault(key, _Row(each))
            row.values.append(each.value)
            if each.baseline is not None and values.get(each.baseline):  # processor time may be less than a tick
                row.ratios.append(each.value / values[each.baseline])
            if each.cpu_share is not None:
                row.cpu_shares.append(each.cpu_share)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows as they are written: medians, and the rounds' own values."""
        return [_as_json(row) for row in self._rows.values()]

    def write(self, path: Path, machine: dict[str, Any]) -> None:
        """Write everything as one JSON object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "rows": self.rows()}, indent=1) + "\n")


def text(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as a table for a terminal."""
    lines = [_line("workload", "transport", "value", "unit", "ratio", "bound", "of what")]
    for row in rows:
        bound = ""
        if row["bound"] is not None:
            bound = f"{row['bound']} {'met' if row['met'] else 'NOT MET'}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        value, of_what = _short(row["value"]), row["baseline"] or row["note"]
        lines.append(_line(row["workload"], row["transport"], value, row["unit"], ratio, bound, of_what))
    return "\n".join(lines)


def _as_json(row: _Row) -> dict[str, Any]:
    first = row.first
    ratio = statistics.median(row.ratios) if row.ratios else None
    return {
        "workload": first.workload,
        "transport": first.transport,
        "value": statistics.median(row.values),
        "unit": first.unit,
        "baseline": None if first.baseline is None else f"{first.baseline[0]} ({first.baseline[1]})",
        "ratio": ratio,
        "bound": None if first.bound is None else str(first.bound),
        "met": None if first.bound is None or ratio is None else first.bound.is_met(ratio),
        "rounds": row.values,
        "round_ratios": row.ratios,
        "load_generator_cpu_share": max(row.cpu_shares) if row.cpu_shares else None,
        "note": first.note,
    }


def _short(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 100 else f"{value:.3g}"


def _line(*cells: str) -> str:
    widths = (44, 12, 9, 12, 6, 16, 0)
    left = (True, True, False, True, False, True, True)
    return "  ".join(
        cell.ljust(width) if is_left else cell.rjust(width)
        for cell, width, is_left in zip(cells, widths, left, strict=True)
    ).rstrip()
