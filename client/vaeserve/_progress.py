"""Progress of bulk calls: the user's own callable, or a bar where there is a terminal and rich to draw it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int | None], None]
Progress = bool | Report


@contextmanager
def reporting(progress: Progress, label: str, total: int | None) -> Iterator[Report]:
    """Give a function to call with (rows done, rows in all or None)."""
    if callable(progress):
        yield progress
    elif progress and sys.stderr.isatty() and importlib.util.find_spec("rich"):
        with _bar(label, total) as report:
            yield report
    else:
        yield lambda _done, _total: None


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Report]:
    from rich.console import Console  # noqa: PLC0415  an extra, and slow to import
    from rich.progress import Progress as Bar  # noqa: PLC0415

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done, _total: bar.update(task, completed=done)
