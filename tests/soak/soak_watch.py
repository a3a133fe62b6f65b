"""What /proc tells of a process: memory, descriptors, threads; and whether they grow."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Under this many seconds of life a process is still warming: its memory says nothing of a leak.
STEADY_S = 60.0
_MEMORY_SHARE, _MEMORY_MB = 0.10, 8.0
_DESCRIPTORS, _THREADS = 2, 1


class Figures(NamedTuple):
    """Of one moment of one process."""

    memory_mb: float
    descriptors: int
    threads: int


class Sample(NamedTuple):
    """Figures with their time."""

    time_s: float
    figures: Figures


def figures(pid: int | str) -> Figures:
    """Return the figures of a process; OSError if it is gone."""
    process = Path("/proc") / str(pid)
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
    memory_kb = int(fields["VmRSS"].split()[0]) if "VmRSS" in fields else 0
    return Figures(memory_kb / 1024, len(list((process / "fd").iterdir())), int(fields["Threads"]))


def growth(samples: Sequence[Sample], rest: Figures) -> list[str]:
    """Return what has grown in a process, given its samples under load and its figures when the load was over.

    Memory of the last fifth of its life is held against that of the middle, as medians: until then a runtime's pools
    grow to what random sizes need. Descriptors and threads at rest are held against those under load early on.
    """
    life_s = samples[-1].time_s - samples[0].time_s
    fifth = max(1, len(samples) // 5)
    parts = samples[fifth : 2 * fifth], samples[2 * fifth : -2 * fifth], samples[-fifth:]
    early, middle, late = [[sample.figures for sample in part or samples] for part in parts]
    problems = []
    if life_s >= STEADY_S:
        before, after = (statistics.median(each.memory_mb for each in part) for part in (middle, late))
        if after > before * (1 + _MEMORY_SHARE) + _MEMORY_MB:
            problems.append(f"memory grew from {before:.0f} to {after:.0f} MB")
    for name, slack in (("descriptors", _DESCRIPTORS), ("threads", _THREADS)):
        most = max(getattr(each, name) for each in early) + slack
        if getattr(rest, name) > most:
            problems.append(f"{getattr(rest, name)} {name} at rest, {most} at most under load early on")
    return problems
