"""When runs start: at once for a lone call, and together for what a busy loop takes in turn by turn."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable

import pytest

from vaeserve_server.executor import RunPool
from vaeserve_server.watchdog import Watchdog

MORE_THAN_QUIET_TURNS = 20


class Source:
    """Hands out all rows that wait as one run, and notes how many those were."""

    def __init__(self, pool: RunPool) -> None:
        self.pool = pool
        self.queued_rows = 0
        self.runs: list[int] = []
        self.done = asyncio.Event()

    def arrive(self, rows: int = 1) -> None:
        self.queued_rows += rows
        self.pool.wake(self)

    def take(self, free_threads: int) -> Source | None:
        if not self.queued_rows:
            return None
        self.runs.append(self.queued_rows)
        self.queued_rows = 0
        return self

    def has_waiting(self) -> bool:
        return self.queued_rows > 0

    def execute(self) -> None:
        pass

    def complete(self) -> None:
        self.done.set()


class FirstRun:
    """What a new thread does first; it ends when `let_go` is set."""

    may_stall = True

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.begun, self.let_go = threading.Event(), threading.Event()
        self.stalled, self.ended = asyncio.Event(), asyncio.Event()

    def execute(self) -> None:
        self.begun.set()
        assert self.let_go.wait(20)
        self.events.append("first run")

    def complete(self) -> None:
        self.events.append("complete")
        self.ended.set()

    def stall(self) -> None:
        self.events.append("stall")
        self.stalled.set()


class Resident:
    def __init__(self, *runs: FirstRun) -> None:
        self.runs = runs

    def first_runs(self) -> tuple[FirstRun, ...]:
        return self.runs


def live(scenario: Callable[[Source], Awaitable[None]]) -> None:
    async def run() -> None:
        pool = RunPool(1)
        try:
            await asyncio.wait_for(scenario(Source(pool)), 20)
        finally:
            await pool.close()

    asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_runs_leave_the_loop_its_core() -> None:
    async def live() -> list[int]:
        pool = RunPool(2)
        priorities: list[int] = []
        await asyncio.to_thread(pool.run_in_each, lambda: priorities.append(os.getpriority(os.PRIO_PROCESS, 0)))
        await pool.close()
        return priorities

    lower = os.getpriority(os.PRIO_PROCESS, 0) + 5
    assert asyncio.run(live()) == [min(lower, 19)] * 2
    assert os.getpriority(os.PRIO_PROCESS, 0) < lower


def test_a_lone_call_waits_for_no_clock() -> None:
    async def scenario(source: Source) -> None:
        source.arrive()
        for _ in range(MORE_THAN_QUIET_TURNS):
            await asyncio.sleep(0)
        assert source.runs == [1]

    live(scenario)


def test_calls_that_a_busy_loop_takes_in_turn_by_turn_share_a_run() -> None:
    async def scenario(source: Source) -> None:
        for _ in range(10):
            source.arrive()
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # a call takes more than one turn to come
        assert source.runs == []
        await source.done.wait()
        assert source.runs == [10]

    live(scenario)


def test_calls_without_end_cannot_hold_up_a_run() -> None:
    async def scenario(source: Source) -> None:
        while not source.runs:
            source.arrive()
            await asyncio.sleep(0)
        assert 1 < source.runs[0] < 100

    live(scenario)


def test_enough_rows_start_at_once() -> None:
    async def scenario(source: Source) -> None:
        source.arrive(512)
        await asyncio.sleep(0)
        assert source.runs == [512]

    live(scenario)


def test_what_came_while_the_threads_were_busy_starts_when_one_is_free() -> None:
    async def scenario(source: Source) -> None:
        source.arrive(64)
        await asyncio.sleep(0)
        source.arrive(3)
        await source.done.wait()
        source.done.clear()
        await source.done.wait()
        assert source.runs == [64, 3]

    live(scenario)


def test_a_thread_that_comes_later_is_made_ready_before_it_takes_runs() -> None:
    async def scenario(source: Source) -> None:
        pool, events = source.pool, []
        hangs, prepares = FirstRun(events), FirstRun(events)
        resident = Resident(prepares)
        pool.residents.add(resident)
        pool.submit(hangs)
        await asyncio.to_thread(hangs.begun.wait, 20)
        pool.replace(pool.workers[0])
        source.arrive(64)
        for _ in range(MORE_THAN_QUIET_TURNS):
            await asyncio.sleep(0)
        assert (events, source.runs) == (["stall"], [])
        prepares.let_go.set()
        await source.done.wait()
        assert (events, source.runs) == (["stall", "first run", "complete"], [64])
        hangs.let_go.set()

    live(scenario)


def test_a_first_run_that_does_not_end_is_found_and_the_others_before_it_were_not_too_long() -> None:
    async def scenario(source: Source) -> None:
        pool, events = source.pool, []
        hangs, first, second = FirstRun(events), FirstRun(events), FirstRun(events)
        first.let_go.set()
        resident = Resident(first, second)
        pool.residents.add(resident)
        watchdog = Watchdog(pool, 0.2)
        pool.submit(hangs)
        await hangs.stalled.wait()
        resident.runs = ()
        await second.stalled.wait()
        source.arrive(64)
        await source.done.wait()
        assert not first.stalled.is_set()
        watchdog.close()
        for run in (hangs, second):
            run.let_go.set()
            await run.ended.wait()
        assert pool._free == 1

    live(scenario)
