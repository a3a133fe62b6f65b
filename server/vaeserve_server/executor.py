"""Running graphs off the event loop: as many runs at once as there are threads, and work chosen as late as possible.

A run is put together only when a thread is free to take it and the loop has nothing else at hand, so that whatever has
come by then goes in one batch. No clock: an idle loop starts a lone call at once, and one that is busy taking calls
would only lose by it, for each hand-over costs it the interpreter lock. A thread per run and two calls to the loop are
all it costs: no executor future, no lock.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Barrier, Thread, current_thread
from typing import Protocol
from weakref import WeakSet

from vaeserve_server.errors import GraphRunError

# From so many rows on a larger run costs hardly less a row, so there is nothing to hold out for.
_ENOUGH_ROWS = 32
# A loop that took in no rows for so many turns has none at hand. More than one, for a call takes several turns to come.
_QUIET_TURNS = 4
# Runs have the cores that the event loop leaves: what it answers or refuses meanwhile takes it microseconds.
_NICE = 5
# At the end: how long runs that were told to stop may take over it.
_LAST_RUNS_S = 5.0

_log = logging.getLogger(__name__)


class Run(Protocol):
    """One unit of work for a thread."""

    def execute(self) -> None:
        """Do the work, in a worker thread; must not raise."""

    def complete(self) -> None:
        """Hand out what came of it, on the event loop."""

    @property
    def may_stall(self) -> bool:
        """Return whether the work is on, and should end by itself. Asked on the event loop."""

    def stall(self) -> None:
        """Take it, on the event loop, that the work does not end. If it does after all, `complete` is called."""


class Worker(Thread):
    """One thread: how many runs it has begun, and which one it has in hand."""

    def __init__(self, work: Callable[[Worker], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.runs = 0
        self.run_in_hand: Run | None = None
        self.lost = False
        self._work_as = work

    def run(self) -> None:
        """Work."""
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + _NICE)
        self._work_as(self)


class RunSource(Protocol):
    """Where runs come from: a batcher."""

    queued_rows: int

    def take(self, free_threads: int) -> Run | None:
        """Return the next run, or None if nothing waits. `free_threads` could start now, the run's own included."""

    def has_waiting(self) -> bool:
        """Return whether another run could be taken at once."""


class Resident(Protocol):
    """What every thread is to be ready for: a model."""

    def first_runs(self) -> Sequence[Run]:
        """Return the runs that make a thread ready which came later. Asked on the event loop."""


class RunPool:
    """Threads shared by every graph of the process; graphs with work take turns.

    All methods belong to the event loop's thread.
    """

    def __init__(self, threads: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.threads = threads
        self._free = threads
        self._ready: deque[RunSource] = deque()
        self._scheduled = False
        self._quiet_turns = 0
        self._runs: SimpleQueue[Run | None] = SimpleQueue()
        self._names = map("run-{}".format, itertools.count())
        self.residents: WeakSet[Resident] = WeakSet()
        self.workers: list[Worker] = []
        for _ in range(threads):
            self._hire()

    def wake(self, source: RunSource) -> None:
        """Note that `source` has work. What else the loop has at hand shares its run."""
        if source not in self._ready:
            self._ready.append(source)
        self._quiet_turns = 0
        self._schedule()

    def submit(self, run: Run) -> None:
        """Have `run` done before what queues from now on."""
        self._free -= 1
        self._runs.put(run)

    def replace(self, worker: Worker) -> None:
        """Take a thread for lost in its run, and have another one instead. It comes back if the run ends after all."""
        run = worker.run_in_hand
        if run is None:
            return
        worker.lost = True
        self.workers.remove(worker)
        run.stall()  # first, for its model needs no new thread just now
        self._hire(_Series([run for resident in self.residents for run in resident.first_runs()]))

    def run_in_each(self, work: Callable[[], None]) -> None:
        """Do `work` once in every thread, all at the same time, and raise what one of them raised. Blocks.

        For another thread than the event loop's, and what must be made ready thread by thread.
        """
        asyncio.run_coroutine_threadsafe(self._run_in_each(work), self.loop).result()

    async def _run_in_each(self, work: Callable[[], None]) -> None:
        together = Barrier(self.threads)  # or one thread would do the work of two
        runs = [_Everywhere(work, together, self.loop.create_future()) for _ in range(self.threads)]
        for run in runs:
            self.submit(run)
        for error in await asyncio.gather(*(run.error for run in runs)):
            if error is not None:
                raise error

    async def close(self) -> None:
        """End the threads, after the runs they have; those that do not end are left to the end of the process."""
        workers = list(self.workers)
        for _ in workers:
            self._runs.put(None)
        left = await asyncio.to_thread(_join, workers, _LAST_RUNS_S)
        if left:
            _log.error("runs did not end", extra={"fields": {"threads": ", ".join(left)}})

    def _hire(self, *first: Run) -> None:
        worker = Worker(partial(self._work, first), next(self._names))
        self.workers.append(worker)
        worker.start()

    def _schedule(self) -> None:
        if self._free > 0 and self._ready and not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._dispatch_when_quiet)

    def _dispatch_when_quiet(self) -> None:
        self._quiet_turns += 1
        if self._quiet_turns > _QUIET_TURNS or sum(source.queued_rows for source in self._ready) >= _ENOUGH_ROWS:
            self._scheduled = False
            self._dispatch()
        else:
            self.loop.call_soon(self._dispatch_when_quiet)

    def _dispatch(self) -> None:
        while self._free > 0 and self._ready:
            source = self._ready.popleft()
            run = source.take(self._free)
            if run is None:
                continue
            if source.has_waiting():
                self._ready.append(source)
            self._free -= 1
            self._runs.put(run)

    def _finished(self, worker: Worker, run: Run) -> None:
        if worker.lost:
            worker.lost = False
            self.workers.append(worker)
            self._runs.put(None)  # for there is one in its place
        else:
            self._free += 1
        try:
            run.complete()
        finally:  # whatever happened to one run, the next ones go on
            self._schedule()

    def _work(self, first: Sequence[Run], worker: Worker) -> None:
        for run in itertools.chain(first, iter(self._runs.get, None)):
            worker.runs += 1
            worker.run_in_hand = run
            run.execute()
            worker.run_in_hand = None
            self.loop.call_soon_threadsafe(self._finished, worker, run)
        self.loop.call_soon_threadsafe(self.workers.remove, worker)


def _join(workers: Sequence[Worker], limit_s: float) -> list[str]:
    """Wait for threads to end; return the names of those that have not."""
    deadline = time.monotonic() + limit_s
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    return [worker.name for worker in workers if worker.is_alive()]


class _Everywhere:
    """One thread's turn of `run_in_each`."""

    def __init__(self, work: Callable[[], None], together: Barrier, error: asyncio.Future[Exception | None]) -> None:
        self._work = work
        self._together = together
        self._raised: Exception | None = None
        self.error = error
        self.may_stall = False  # while it waits for the other threads

    def execute(self) -> None:
        self._together.wait()
        self.may_stall = True
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - raised again where the work was asked for
            self._raised = error

    def complete(self) -> None:
        if not self.error.done():
            self.error.set_result(self._raised)

    def stall(self) -> None:
        self.error.set_result(GraphRunError("the run does not end"))


class _Series:
    """Runs one after another in one thread. Each begins anew for the watchdog."""

    may_stall = True

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._in_hand: Run | None = None

    def execute(self) -> None:
        worker = current_thread()
        assert isinstance(worker, Worker)
        for run in self._runs:
            self._in_hand = run
            worker.runs += 1
            run.execute()

    def complete(self) -> None:
        for run in self._runs:
            run.complete()
        self._runs, self._in_hand = (), None  # a thread keeps its first run

    def stall(self) -> None:
        if self._in_hand is not None:
            self._in_hand.stall()
