"""What the server counts of itself: plain numbers that cost a call well under a microsecond, and know no exporter.

Only the event loop's thread adds to them. Others may read them at any time: what they see is at most one call old, and
every histogram's count is the sum of the buckets that were read with it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextvars import ContextVar

# Each bucket is twice as wide as the one before: a quantile read off them is at most a factor of two wrong anywhere
# between the shortest wait and the longest run.
DURATION_BOUNDS_S = tuple(15e-6 * 2**k for k in range(20))  # 15 us to 7.9 s
ROW_BOUNDS = tuple(2**k for k in range(13))  # 1 to 4096
_CODES = 17  # google.rpc.Code: 0 to 16


class Histogram:
    """Counts of values up to each bound, above the last one, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class GraphStats:
    """What went through one graph of one model version."""

    __slots__ = ("batch_rows", "compute_s", "graph", "model", "queue_s", "rows_by_rpc", "version")

    def __init__(self, model: str = "", version: str = "", graph: str = "") -> None:
        self.model = model
        self.version = version
        self.graph = graph
        self.queue_s = Histogram(DURATION_BOUNDS_S)
        self.compute_s = Histogram(DURATION_BOUNDS_S)
        self.batch_rows = Histogram(ROW_BOUNDS)
        self.rows_by_rpc: dict[str, int] = {}


class MethodStats:
    """The calls of one RPC: how many came, and how they ended. `codes` is indexed by google.rpc.Code.

    `refused` counts full queues.
    """

    __slots__ = ("codes", "duration_s", "refused", "rpc", "started")

    def __init__(self, rpc: str) -> None:
        self.rpc = rpc
        self.started = 0
        self.codes = [0] * _CODES
        self.duration_s = Histogram(DURATION_BOUNDS_S)
        self.refused = 0


class Passage:
    """One call's way through one graph. Times are time.monotonic()'s; `ended` is 0 until its rows are back.

    Not the event loop's own: uvloop counts whole milliseconds, and a queue is often a matter of microseconds.

    `compute_s` adds up the runs that had rows of the call, `batch_rows` is the size of the largest of them.
    """

    __slots__ = ("batch_rows", "compute_s", "ended", "graph", "rows", "started", "submitted")

    def __init__(self, graph: GraphStats, rows: int, submitted: float) -> None:
        self.graph = graph
        self.rows = rows
        self.submitted = submitted
        self.started = 0.0
        self.ended = 0.0
        self.compute_s = 0.0
        self.batch_rows = 0


passages: ContextVar[list[Passage]] = ContextVar("passages")
"""The passages of the call that the current task answers, where somebody wants to know them."""
