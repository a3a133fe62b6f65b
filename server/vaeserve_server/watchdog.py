"""Runs that do not end: found by looking at the threads now and then, and their threads replaced.

A graph that hangs, on a GPU that hangs, holds its thread for good. Its calls are then told, its model is not called any
more, and the other models go on in the new thread. Looks are counted rather than time: a process that was stopped, or a
machine that slept, wakes to one look, not to runs that seem to have taken hours.
"""

from __future__ import annotations

import asyncio
import logging

from vaeserve_server.executor import RunPool, Worker

_LOOKS = 4

_log = logging.getLogger(__name__)


class Watchdog:
    """Watches the threads of `pool` from the start to `close`; a run may be on for `limit_s`, and a quarter more."""

    def __init__(self, pool: RunPool, limit_s: float) -> None:
        self._pool = pool
        self._period_s = limit_s / _LOOKS
        self._limit_s = limit_s
        self._seen: dict[Worker, tuple[int, int]] = {}  # the number of its run, and how many looks found that one on
        self._timer: asyncio.TimerHandle
        self._wait()

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _wait(self) -> None:
        self._timer = self._pool.loop.call_later(self._period_s, self._look)

    def _look(self) -> None:
        seen: dict[Worker, tuple[int, int]] = {}
        for worker in list(self._pool.workers):
            number, run = worker.runs, worker.run_in_hand
            if run is None or not run.may_stall:
                continue
            before, looks = self._seen.get(worker, (0, 0))
            seen[worker] = number, looks + 1 if number == before else 0
            if seen[worker][1] >= _LOOKS:
                _log.error("a run does not end", extra={"fields": {"thread": worker.name, "limit_s": self._limit_s}})
                self._pool.replace(worker)
                del seen[worker]
        self._seen = seen
        self._wait()
