"""Rows of many calls in one run: each call gets its own rows, whatever others do."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vaeserve_server.batcher import Batcher, BatchRun, Outputs
from vaeserve_server.checks import Floats
from vaeserve_server.errors import CallError, DeadlineError, GraphRunError, InvalidInputError, QueueFullError
from vaeserve_server.executor import RunPool


class Rows:
    """Work on plain rows, whose answer is the graph's output and the input it came from."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = np.array(values, np.float32)[:, None]
        self.rows = len(values)

    def write(self, start: int, stop: int, out: Floats) -> None:
        out[...] = self.values[start:stop]

    def finish(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> Outputs:
        assert np.array_equal(batch, self.values[start : start + len(batch)])
        return outputs[0], batch

    def refuse(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> InvalidInputError:
        return InvalidInputError("rows", f"row {start + int(np.argmin(np.isfinite(outputs[0])))}")


class Gate:
    """A graph, x -> 2 x + 1, that runs only while it is open and remembers the batches it ran."""

    def __init__(self, *, opened: bool = True) -> None:
        self.batches: list[list[float]] = []
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()
        if opened:
            self._open.set()

    def __call__(self, batch: Floats) -> Sequence[Floats]:
        self.entered.release()
        assert self._open.wait(20)
        self.batches.append(batch[:, 0].tolist())
        if np.isnan(batch).any():
            raise GraphRunError("a poisoned row")
        return [2 * batch + 1]

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    async def until_entered(self) -> None:
        await asyncio.to_thread(self.entered.acquire, timeout=20)


def with_batcher(
    scenario: Callable[[Batcher], Awaitable[None]],
    graph: Callable[[Floats], Sequence[Floats]],
    *,
    threads: int = 1,
    max_batch_rows: int = 16,
    max_queue_rows: int = 10_000,
    wait_s: float = 0.0,
) -> None:
    """Run `scenario` with a batcher in a fresh loop; any error that asyncio only logs fails it too."""

    async def live() -> None:
        complaints: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        pool = RunPool(threads)
        batcher = Batcher(
            graph, (1,), pool, max_batch_rows=max_batch_rows, max_queue_rows=max_queue_rows, wait_s=wait_s
        )
        try:
            await asyncio.wait_for(scenario(batcher), 30)
            assert batcher.queued_rows == 0
            assert not batcher.has_waiting()
        finally:
            if isinstance(graph, Gate):
                graph.open()
            await pool.close()
        await asyncio.sleep(0)
        assert not complaints

    asyncio.run(live())


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    calls=st.lists(
        st.tuples(st.integers(1, 50), st.sampled_from(["wait", "wait", "cancel", "expire", "poison"])),
        min_size=1,
        max_size=25,
    ),
    threads=st.integers(1, 3),
    max_batch_rows=st.sampled_from([1, 3, 16, 64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_call_gets_its_own_rows_and_its_own_fate(
    calls: list[tuple[int, str]], threads: int, max_batch_rows: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    excused = {"cancel": asyncio.CancelledError, "expire": DeadlineError}

    async def scenario(batcher: Batcher) -> None:
        works = []
        for index, (rows, fate) in enumerate(calls):
            values = 1000.0 * index + np.arange(rows)
            if fate == "poison":
                values[random.integers(rows)] = math.nan
            works.append(Rows(list(values)))
        now = time.monotonic()
        tasks = []
        for work, (_, fate) in zip(works, calls, strict=True):
            deadline = now + random.uniform(0, 0.002) if fate == "expire" else math.inf
            tasks.append(asyncio.create_task(batcher.submit(work, deadline)))
            if random.random() < 0.3:
                await asyncio.sleep(0)
        for task, (_, fate) in zip(tasks, calls, strict=True):
            if fate == "cancel":
                asyncio.get_running_loop().call_later(random.uniform(0, 0.002), task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for work, (_, fate), result in zip(works, calls, results, strict=True):
            if fate == "poison":
                assert isinstance(result, GraphRunError)
            elif not isinstance(result, excused.get(fate, ())):
                assert isinstance(result, tuple), result
                assert np.array_equal(result[0], 2 * work.values + 1)
                assert np.array_equal(result[1], work.values)

    with_batcher(scenario, _poisonable, threads=threads, max_batch_rows=max_batch_rows)


def _poisonable(batch: Floats) -> Sequence[Floats]:
    if np.isnan(batch).any():
        raise GraphRunError("a poisoned row")
    return [2 * batch + 1]


def test_what_queues_while_a_run_is_on_goes_together() -> None:
    gate = Gate(opened=False)

    async def scenario(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(Rows([0])))
        await gate.until_entered()
        others = [asyncio.create_task(batcher.submit(Rows([i]))) for i in range(1, 6)]
        await settle()
        assert batcher.queued_rows == 5
        gate.open()
        await asyncio.gather(first, *others)

    with_batcher(scenario, gate)
    assert gate.batches == [[0], [1, 2, 3, 4, 5]]


def test_calls_of_one_turn_share_the_first_run() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        await asyncio.gather(*(batcher.submit(Rows([i])) for i in range(5)))

    with_batcher(scenario, gate)
    assert gate.batches == [[0, 1, 2, 3, 4]]


def test_a_long_call_does_not_hold_up_short_ones() -> None:
    gate = Gate(opened=False)

    async def scenario(batcher: Batcher) -> None:
        long = asyncio.create_task(batcher.submit(Rows(range(100))))
        await gate.until_entered()
        short = [asyncio.create_task(batcher.submit(Rows([1000 + i]))) for i in range(3)]
        await settle()
        gate.open()
        done, _ = await asyncio.wait({long, *short}, return_when=asyncio.FIRST_COMPLETED)
        assert long not in done
        await asyncio.gather(long, *short)

    with_batcher(scenario, gate, max_batch_rows=10)
    # One run had begun, and one more stood before them; then they go, and the long call fills the rest.
    assert any(value >= 1000 for batch in gate.batches[:3] for value in batch)
    assert all(len(batch) == 10 for batch in gate.batches[:10])


def test_two_long_calls_take_turns() -> None:
    gate = Gate(opened=False)

    async def scenario(batcher: Batcher) -> None:
        calls = [asyncio.create_task(batcher.submit(Rows([1000 * i + j for j in range(40)]))) for i in range(2)]
        await gate.until_entered()
        gate.open()
        await asyncio.gather(*calls)

    with_batcher(scenario, gate, max_batch_rows=10)
    assert [batch[0] // 1000 for batch in gate.batches] == [0, 1] * 4


def test_free_threads_share_a_large_batch() -> None:
    gate = Gate(opened=False)

    async def scenario(batcher: Batcher) -> None:
        call = asyncio.create_task(batcher.submit(Rows(range(64))))
        await gate.until_entered()
        await gate.until_entered()  # both threads are in a run at the same time
        gate.open()
        assert np.array_equal((await call)[1][:, 0], np.arange(64))

    with_batcher(scenario, gate, threads=2, max_batch_rows=64)
    assert sorted(map(len, gate.batches)) == [32, 32]


def test_cancelled_calls_leave_at_once_and_never_run() -> None:
    gate = Gate(opened=False)

    async def scenario(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(Rows([0])))
        await gate.until_entered()
        doomed = [asyncio.create_task(batcher.submit(Rows([7]))) for _ in range(1000)]
        await settle()
        assert batcher.queued_rows == 1000
        for task in doomed:
            task.cancel()
        await settle()
        assert batcher.queued_rows == 0
        assert not batcher.has_waiting()
        gate.open()
        await first
        await batcher.submit(Rows([1]))

    with_batcher(scenario, gate)
    assert gate.batches == [[0], [1]]


def test_a_call_cancelled_while_it_runs_stops_nothing() -> None:
    gate = Gate(opened=False)

    async def scenario(batcher: Batcher) -> None:
        calls = [asyncio.create_task(batcher.submit(Rows([i]))) for i in range(3)]
        await gate.until_entered()
        calls[1].cancel()
        await settle()
        gate.open()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert [result[0].item() for result in (results[0], results[2])] == [1, 5]  # type: ignore[index,union-attr]

    with_batcher(scenario, gate)


def test_an_expired_call_costs_no_run() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(DeadlineError):
            await batcher.submit(Rows([1]), deadline=time.monotonic() - 1)

    with_batcher(scenario, gate)
    assert gate.batches == []


def test_a_poisoned_row_fails_its_own_call_only() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        calls = [[1.0, 2.0], [3.0, math.nan], [4.0]]
        results = await asyncio.gather(*(batcher.submit(Rows(call)) for call in calls), return_exceptions=True)
        assert isinstance(results[1], GraphRunError)
        assert [result[0][:, 0].tolist() for result in (results[0], results[2])] == [[3, 5], [9]]  # type: ignore[index,union-attr]

    with_batcher(scenario, gate)


def test_an_answer_that_is_not_finite_fails_its_own_call_without_another_run() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        refused, answered = await asyncio.gather(
            batcher.submit(Rows([1, math.inf])), batcher.submit(Rows([2])), return_exceptions=True
        )
        assert isinstance(refused, InvalidInputError)
        assert str(refused) == "row 1"
        assert answered[0].item() == 5  # type: ignore[index,union-attr]

    with_batcher(scenario, gate)
    assert gate.batches == [[1, math.inf, 2]]


def test_rows_that_are_not_worth_a_thread_join_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0001])  # the first run, of one row
    timed = SimpleNamespace(perf_counter=lambda: next(clock, 0.0), monotonic=lambda: 0.0)
    monkeypatch.setattr("vaeserve_server.batcher.time", timed)
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        await batcher.submit(Rows([0]))
        gate.close()
        await gate.until_entered()
        calls = [asyncio.create_task(batcher.submit(Rows([1])))]
        await gate.until_entered()
        for i in range(2, 11):  # at most 0.9 ms: a second thread stays idle
            calls.append(asyncio.create_task(batcher.submit(Rows([i]))))
            await settle()
        assert batcher.queued_rows == 9
        calls.append(asyncio.create_task(batcher.submit(Rows([11]))))
        await gate.until_entered()  # 1 ms is worth it
        assert batcher.queued_rows == 0
        gate.open()
        await asyncio.gather(*calls)

    with_batcher(scenario, gate, threads=2)
    assert sorted(gate.batches, key=len) == [[0], [1], list(range(2, 12))]


@pytest.mark.parametrize(("rows", "starts"), [(20, False), (40, True)])
def test_a_row_waits_for_the_run_that_is_on_only_if_that_ends_soon(
    rows: int, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0004])  # the first run, of one row, which is not worth a thread; 20 rows take 8 ms, 40 take 16
    timed = SimpleNamespace(perf_counter=lambda: next(clock, 0.0), monotonic=lambda: 0.0)
    monkeypatch.setattr("vaeserve_server.batcher.time", timed)

    async def live() -> None:
        pool: Any = SimpleNamespace(loop=asyncio.get_running_loop(), threads=2, wake=lambda _: None)
        batcher = Batcher(Gate(), (1,), pool, max_batch_rows=128, max_queue_rows=1000)
        calls = []

        async def ask_and_take(count: int) -> BatchRun | None:
            calls.append(asyncio.create_task(batcher.submit(Rows(range(count)))))
            await settle()
            return batcher.take(1)

        finish(await ask_and_take(1))
        long = await ask_and_take(rows)
        lone = await ask_and_take(1)
        assert (lone is not None) == starts
        finish(long)
        finish(lone or batcher.take(1))
        await asyncio.gather(*calls)

    def finish(run: BatchRun | None) -> None:
        assert run is not None
        run.execute()
        run.complete()

    asyncio.run(live())


@pytest.mark.parametrize("error", [MemoryError(), ValueError("x")])
def test_an_answer_that_cannot_be_put_together_fails_its_own_call_only(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise error

    async def scenario(batcher: Batcher) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("vaeserve_server.batcher.np.concatenate", no_room)
            with pytest.raises(type(error)):
                await batcher.submit(Rows(range(40)))
        answer, _ = await batcher.submit(Rows([3]))
        assert answer.item() == 7

    with_batcher(scenario, Gate())


def test_a_failed_piece_fails_the_call_and_drops_its_rest() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(GraphRunError):
            await batcher.submit(Rows([math.nan, *range(99)]))

    with_batcher(scenario, gate, max_batch_rows=10)
    assert len(gate.batches) < 3


@pytest.mark.parametrize("error", [StopIteration(), MemoryError(), ValueError("x")])
def test_whatever_a_graph_raises_the_call_ends(error: Exception) -> None:
    def graph(batch: Floats) -> Sequence[Floats]:
        raise error

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises((GraphRunError, MemoryError, ValueError)):
            await batcher.submit(Rows([1]))

    with_batcher(scenario, graph)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    gate = Gate(opened=False)

    async def scenario(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.submit(Rows([0])))
        await gate.until_entered()
        queued = asyncio.create_task(batcher.submit(Rows(range(20))))
        await settle()
        with pytest.raises(QueueFullError, match="holds 20 of at most 20 rows and the call has 1") as refusal:
            await batcher.submit(Rows([1]))
        assert refusal.value.retry_after_s is not None
        assert 0 < refusal.value.retry_after_s <= 15
        with pytest.raises(QueueFullError, match="has 21 rows but the queue holds 20") as refusal:
            await batcher.submit(Rows(range(21)))
        assert refusal.value.retry_after_s is None
        gate.open()
        await asyncio.gather(running, queued)
        await batcher.submit(Rows([1]))

    with_batcher(scenario, gate, max_queue_rows=20)


def test_push_back_follows_how_fast_the_queue_clears(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0])  # the first run begins and ends
    timed = SimpleNamespace(perf_counter=lambda: next(clock, 0.0), monotonic=time.monotonic)
    monkeypatch.setattr("vaeserve_server.batcher.time", timed)
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        await batcher.submit(Rows(range(10)))  # 5 rows a second
        gate.close()
        await gate.until_entered()
        running = asyncio.create_task(batcher.submit(Rows([0])))
        await gate.until_entered()
        queued = asyncio.create_task(batcher.submit(Rows(range(20))))
        await settle()
        with pytest.raises(QueueFullError) as refusal:
            await batcher.submit(Rows([1]))
        assert refusal.value.retry_after_s is not None
        assert 4.0 <= refusal.value.retry_after_s <= 6.0  # 20 rows, and up to half as much again
        gate.open()
        await asyncio.gather(running, queued)

    with_batcher(scenario, gate, max_queue_rows=20)


def test_opt_in_waiting_gathers_calls_of_several_turns() -> None:
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        calls = []
        for i in range(3):
            calls.append(asyncio.create_task(batcher.submit(Rows([i]))))
            await settle()
        await asyncio.gather(*calls)

    with_batcher(scenario, gate, wait_s=0.5)
    assert gate.batches == [[0, 1, 2]]


def test_a_full_batch_does_not_wait() -> None:
    async def scenario(batcher: Batcher) -> None:
        await asyncio.gather(*(batcher.submit(Rows(range(8))) for _ in range(2)))

    with_batcher(scenario, Gate(), wait_s=3600)


def test_closing_refuses_what_waits_and_answers_what_runs() -> None:
    gate = Gate(opened=False)

    async def scenario(batcher: Batcher) -> None:
        running = asyncio.create_task(batcher.submit(Rows([0])))
        await gate.until_entered()
        waiting = asyncio.create_task(batcher.submit(Rows([1])))
        await settle()
        batcher.close()
        with pytest.raises(CallError, match="no longer served"):
            await waiting
        gate.open()
        assert (await running)[0].item() == 1

    with_batcher(scenario, gate)


def test_two_graphs_share_the_threads_in_turns() -> None:
    order: list[str] = []
    gate = Gate(opened=False)

    async def live() -> None:
        pool = RunPool(1)
        options = {"max_batch_rows": 1, "max_queue_rows": 100}

        def noting(name: str) -> Callable[[Floats], Sequence[Floats]]:
            return lambda batch: order.append(name) or [batch]  # type: ignore[func-returns-value]

        blocker = Batcher(gate, (1,), pool, **options)
        first, second = (Batcher(noting(name), (1,), pool, **options) for name in "ab")
        blocked = asyncio.create_task(blocker.submit(Rows([0])))
        await gate.until_entered()
        calls = [asyncio.create_task(batcher.submit(Rows(range(3)))) for batcher in (first, second)]
        await settle()
        gate.open()
        await asyncio.gather(blocked, *calls)
        await pool.close()

    asyncio.run(live())
    assert order == list("ababab")
