"""Rows of many calls -> one run of a graph, and back: each call gets exactly its own rows.

No waiting by default: while threads are busy calls queue, and when one is free what has queued goes together, up to a
row limit. A call larger than a run is cut in pieces; after each piece it goes to the back of the queue, and so never
holds up short calls. A cancelled or expired call leaves the queue before it costs a run. A run that fails is tried
again call by call, so that only the call at fault fails.

Everything here belongs to the event loop's thread, except `BatchRun.execute`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from vaeserve_server.checks import Array, Floats, is_finite
from vaeserve_server.condition import Condition
from vaeserve_server.errors import CallError, DeadlineError, GraphRunError, NotServingError, QueueFullError
from vaeserve_server.executor import RunPool
from vaeserve_server.stats import GraphStats, Passage, passages

Outputs = tuple[Array, ...]
RunGraph = Callable[[Floats], Sequence[Floats]]

# A run shorter than this costs more in hand-over than another thread gains, so its rows rather join another run.
_WORTH_A_THREAD_S = 0.001
# But not for longer than this until that run ends.
_WORTH_WAITING_S = 0.01
_FIRST_RETRY_S = 0.05
_MIN_RETRY_S = 0.005
_MAX_RETRY_S = 10.0


class Work(Protocol):
    """The rows of one call. All but `rows` is called in worker threads, on any piece of the call and in any order."""

    rows: int

    def write(self, start: int, stop: int, out: Floats) -> None:
        """Write the graph's input for rows start..stop into `out` `(stop - start, ...)`."""

    def finish(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> Outputs:
        """Return the answer for the rows from `start` on, given the graph's input and finite outputs for them."""

    def refuse(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> CallError | GraphRunError:
        """Return the error of this call if the graph's outputs for the rows from `start` on are not finite."""


class Job(Passage):
    """A call in the queue: how many of its rows are taken by runs, and what has come back."""

    __slots__ = ("deadline", "future", "pieces", "taken", "unanswered", "work")

    def __init__(
        self, work: Work, deadline: float, future: asyncio.Future[Outputs], graph: GraphStats, submitted: float
    ) -> None:
        super().__init__(graph, work.rows, submitted)
        self.work = work
        self.deadline = deadline
        self.future = future
        self.taken = 0
        self.unanswered = work.rows
        self.pieces: list[tuple[int, Outputs]] | None = None  # only of a call cut in pieces


class Piece(NamedTuple):
    """Rows start..stop of a job, which one run computes."""

    job: Job
    start: int
    stop: int


class Batcher:
    """The queue of one graph. `graph` computes a batch in a worker thread; `row_shape` is one row of its input."""

    def __init__(
        self,
        graph: RunGraph,
        row_shape: tuple[int, ...],
        pool: RunPool,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        wait_s: float = 0.0,
        stats: GraphStats | None = None,
        condition: Condition | None = None,
    ) -> None:
        self.queued_rows = 0
        self.stats = stats or GraphStats()
        self._condition = condition or Condition(pool)
        self._graph = graph
        self._row_shape = row_shape
        self._pool = pool
        self._loop = pool.loop
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._wait_s = wait_s
        self._timer: asyncio.TimerHandle | None = None
        self._queue: OrderedDict[Job, None] = OrderedDict()  # a deque that any member can leave at once
        self._running = 0
        self._last_end = 0.0  # when the last of the runs that are on is to end, by time.monotonic()
        self._row_s = 0.0  # time of one row in one thread, as the last runs had it; 0 until there was one

    async def submit(self, work: Work, deadline: float = math.inf) -> Outputs:
        """Return the answer to `work`, once its rows have been through the graph.

        `deadline` is time.monotonic()'s. Raises QueueFullError, DeadlineError, GraphRunError, or what `refuse` returns.
        """
        if self.queued_rows + work.rows > self._max_queue_rows:
            raise self._queue_full(work.rows)
        job = Job(work, deadline, self._loop.create_future(), self.stats, time.monotonic())
        watched = passages.get(None)
        if watched is not None:
            watched.append(job)
        self._queue[job] = None
        self.queued_rows += work.rows
        self._announce()
        try:
            return await job.future
        except asyncio.CancelledError:
            self._withdraw(job)
            # An error that came in the same turn has nobody left to read it; asyncio would complain.
            _ = job.future.cancelled() or job.future.exception()
            raise

    def has_waiting(self) -> bool:
        """Return whether any row waits."""
        return bool(self._queue)

    def retry_after_s(self) -> float:
        """Return when to come again after a refusal: when the queue may be clear. It differs from call to call."""
        clear_s = self.queued_rows * self._row_s / self._pool.threads if self._row_s else _FIRST_RETRY_S
        # Spread out, or all who were refused together come back together.
        return min(max(clear_s, _MIN_RETRY_S), _MAX_RETRY_S) * random.uniform(1.0, 1.5)

    @property
    def is_full(self) -> bool:
        """Return whether not one row more may wait."""
        return self.queued_rows >= self._max_queue_rows

    def take(self, free_threads: int) -> BatchRun | None:
        """Return a run of the rows that have waited longest, at most a fair share of them for one of `free_threads`.

        None also if a run is on and what waits is better run together with what comes until its end, which is near.
        """
        now = time.monotonic()
        worthwhile = int(self.queued_rows * self._row_s / _WORTH_A_THREAD_S) if self._row_s else free_threads
        if self._running and not worthwhile and abs(self._last_end - now) < _WORTH_WAITING_S:
            return None
        share = -(-self.queued_rows // max(1, min(free_threads, worthwhile)))
        limit = min(share, self._max_batch_rows)
        pieces: list[Piece] = []
        rows = 0
        while rows < limit and self._queue:
            job = next(iter(self._queue))
            if job.deadline <= now:
                self._fail(job, DeadlineError("the deadline passed while the call was queued"))
                continue
            start = job.taken
            if not start:
                job.started = now
            stop = min(job.work.rows, start + limit - rows)
            pieces.append(Piece(job, start, stop))
            job.taken = stop
            rows += stop - start
            if stop == job.work.rows:
                del self._queue[job]
            else:
                self._queue.move_to_end(job)
        self.queued_rows -= rows
        if not pieces:
            return None
        self._running += 1
        self._last_end = max(self._last_end, now + rows * self._row_s)
        return BatchRun(self, pieces, rows)

    def compute(self, pieces: Sequence[Piece], rows: int) -> list[Outputs | Exception]:
        """Return each piece's answer or its error, in order, from one run of the graph. Called in a worker thread."""
        batch = np.empty((rows, *self._row_shape), np.float32)
        position = 0
        for job, start, stop in pieces:
            job.work.write(start, stop, batch[position : position + stop - start])
            position += stop - start
        outputs = self._graph(batch)
        sound = all(map(is_finite, outputs))  # once for all, as it nearly always is
        answers: list[Outputs | Exception] = []
        position = 0
        for job, start, stop in pieces:
            own = slice(position, position + stop - start)
            own_outputs = [output[own] for output in outputs]
            if sound or all(map(is_finite, own_outputs)):
                answers.append(job.work.finish(start, batch[own], own_outputs))
            else:
                answers.append(job.work.refuse(start, batch[own], own_outputs))
            position += stop - start
        return answers

    def answer(self, pieces: Sequence[Piece], answers: Sequence[Outputs | Exception], seconds: float) -> None:
        """Give every call its piece, and note how fast rows are going through."""
        rows = sum(piece.stop - piece.start for piece in pieces)
        now = time.monotonic()
        for piece, answer in zip(pieces, answers, strict=True):
            self._note(piece, rows, seconds, now)
            if isinstance(answer, Exception):
                self._fail(piece.job, answer)
                if isinstance(answer, GraphRunError):
                    self._condition.run_failed()
            else:
                try:
                    _deliver(piece, answer)
                except Exception as error:  # noqa: BLE001 - of putting pieces together; the run's other calls go on
                    self._fail(piece.job, error)
        self.stats.batch_rows.observe(rows)
        self.stats.compute_s.observe(seconds)
        row_s = seconds / rows
        self._row_s = 0.8 * self._row_s + 0.2 * row_s if self._row_s else row_s
        self._running -= 1
        if self._queue:
            self._pool.wake(self)

    def give_up(self, pieces: Sequence[Piece]) -> None:
        """Tell the calls of a run that does not end, and every call that waits."""
        self._running -= 1
        for job in [*(piece.job for piece in pieces), *self._queue]:
            self._fail(job, NotServingError("the model does not answer: a run does not end"))
        self._condition.run_stalled()

    def take_back(self) -> None:
        """Go on after a run that did end, after all."""
        self._condition.run_returned()

    def close(self) -> None:
        """Refuse every call that still waits."""
        for job in list(self._queue):
            self._fail(job, NotServingError("the model is no longer served"))

    def _note(self, piece: Piece, rows: int, seconds: float, now: float) -> None:
        """Note what a run of `rows` rows was to the call of one of its pieces."""
        job = piece.job
        if not piece.start:
            self.stats.queue_s.observe(job.started - job.submitted)
        job.compute_s += seconds
        job.batch_rows = max(job.batch_rows, rows)
        job.ended = now

    def _announce(self) -> None:
        if not self._wait_s or self.queued_rows >= self._max_batch_rows:
            self._pool.wake(self)
        elif self._timer is None:
            self._timer = self._loop.call_later(self._wait_s, self._waited)

    def _waited(self) -> None:
        self._timer = None
        self._pool.wake(self)

    def _withdraw(self, job: Job) -> None:
        if job in self._queue:
            del self._queue[job]
            self.queued_rows -= job.work.rows - job.taken

    def _fail(self, job: Job, error: Exception) -> None:
        self._withdraw(job)
        if not job.future.done():
            job.future.set_exception(error)

    def _queue_full(self, rows: int) -> QueueFullError:
        if rows > self._max_queue_rows:
            message = (
                f"the call has {rows} rows but the queue holds {self._max_queue_rows}; send fewer rows in one call"
            )
            return QueueFullError(message, None)
        retry_after_s = self.retry_after_s()
        return QueueFullError(
            f"the queue holds {self.queued_rows} of at most {self._max_queue_rows} rows and the call has {rows}; "
            f"try again in {retry_after_s:.3f} s",
            retry_after_s,
        )


class BatchRun:
    """One run of a graph for the pieces of several calls."""

    __slots__ = ("_answers", "_batcher", "_pieces", "_rows", "_seconds", "_stalled")
    may_stall = True

    def __init__(self, batcher: Batcher, pieces: list[Piece], rows: int) -> None:
        self._batcher = batcher
        self._pieces = pieces
        self._rows = rows
        self._answers: list[Outputs | Exception] = []
        self._seconds = 0.0
        self._stalled = False

    def execute(self) -> None:
        """Compute every piece's answer; if the run fails, run each call's piece by itself."""
        started = time.perf_counter()
        try:
            self._answers = self._batcher.compute(self._pieces, self._rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer of the calls whose rows these are
            self._answers = [_unwrapped(error)] if len(self._pieces) == 1 else self._one_by_one()
        self._seconds = time.perf_counter() - started

    def complete(self) -> None:
        """Hand the answers out, unless nobody waits for them any more."""
        if self._stalled:
            self._batcher.take_back()
        else:
            self._batcher.answer(self._pieces, self._answers, self._seconds)

    def stall(self) -> None:
        """Let nobody wait for it any longer."""
        self._stalled = True
        self._batcher.give_up(self._pieces)

    def _one_by_one(self) -> list[Outputs | Exception]:
        answers: list[Outputs | Exception] = []
        for piece in self._pieces:
            run = BatchRun(self._batcher, [piece], piece.stop - piece.start)
            run.execute()
            answers += run._answers
        return answers


def _deliver(piece: Piece, answer: Outputs) -> None:
    """Settle the call if this was its last piece. A call that was cancelled meanwhile is past settling."""
    job = piece.job
    job.unanswered -= piece.stop - piece.start
    if job.future.done():
        return
    if piece.stop - piece.start == job.work.rows:
        job.future.set_result(answer)
        return
    if job.pieces is None:
        job.pieces = []
    job.pieces.append((piece.start, answer))
    if not job.unanswered:
        parts = [outputs for _, outputs in sorted(job.pieces, key=lambda part: part[0])]
        job.future.set_result(tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _unwrapped(error: Exception) -> Exception:
    """Return the error as a future takes it; it refuses StopIteration."""
    return GraphRunError("the run ended with StopIteration") if isinstance(error, StopIteration) else error
