"""Calls made at the same time by many tasks, sent as one: their rows go together, each gets its own back.

The cost of a small call is the call, not its rows. As in the server's batcher nobody waits for company: what tasks ask
for in one turn of the event loop goes together, and what comes while calls are under way goes with the next one.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any

import numpy as np

from vaeserve._calls import Job, Part
from vaeserve._results import Array
from vaeserve.errors import (
    Cancelled,
    ClientClosed,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    UnknownError,
    no_answer,
)

Send = Callable[[Job[Any], Part, float], Awaitable[Any]]

# One under way and one on its way to the server; more would only be smaller.
_CALLS_UNDER_WAY = 2
# Each task's own clock ends its waiting, in its own words; the call that carries it must not end just before.
_GRACE_S = 1.0
# What says nothing of the rows that were sent, and would be no different for any of them alone.
_OF_EVERYBODY = (
    Cancelled,
    ClientClosed,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)


class _Member:
    """One task's rows, and the future it waits for; `batch` is what carries them, once something does."""

    __slots__ = ("array", "batch", "deadline", "deadline_s", "future", "job", "rows")

    def __init__(self, job: Job[Any], array: Array, deadline_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self.job = job
        self.array = array
        self.rows = len(array)
        self.deadline_s = deadline_s
        self.deadline = loop.time() + deadline_s
        self.future: asyncio.Future[Any] = loop.create_future()
        self.batch: _Batch | None = None


class _Batch:
    """Members that travel in one call."""

    __slots__ = ("members", "task")

    def __init__(self, members: list[_Member]) -> None:
        self.members = members
        self.task: asyncio.Task[None]


class _Group:
    """Calls that may travel together."""

    __slots__ = ("key", "most_rows", "scheduled", "under_way", "waiting")

    def __init__(self, key: object, most_rows: int) -> None:
        self.key = key
        self.most_rows = most_rows
        self.waiting: dict[_Member, None] = {}  # in order; any of them can leave at once
        self.under_way: set[_Batch] = set()
        self.scheduled = False


class Coalescer:
    """Sends the calls of one client by `send`; all of it belongs to one event loop.

    Together travel calls of one operation to one model whose rows are of one shape and type. A call that fails for what
    was in it is sent again member by member, so that only those at fault fail.
    """

    def __init__(self, send: Send, target: str) -> None:
        self._send = send
        self._target = target
        self._groups: dict[object, _Group] = {}
        self._members: dict[_Member, None] = {}  # all that wait for an answer
        self._clock: asyncio.TimerHandle | None = None  # one for all: a timer each costs more than the rest of a call

    async def ask(self, job: Job[Any], part: Part, most_rows: int, deadline_s: float) -> Any:
        """Return the value of `part`, which has rows, in views of a message; a call carries at most `most_rows` rows.

        Raises what `send` does, and DeadlineExceeded after `deadline_s`. Cancelling leaves the others alone.
        """
        assert part.array is not None
        key = (job.operation, job.ref, part.array.dtype, part.array.shape[1:], most_rows)
        group = self._groups.get(key) or self._groups.setdefault(key, _Group(key, most_rows))
        loop = asyncio.get_running_loop()
        member = _Member(job, part.array, deadline_s, loop)
        self._members[member] = None
        self._wind(loop, member.deadline)
        group.waiting[member] = None
        if not group.scheduled and len(group.under_way) < _CALLS_UNDER_WAY:
            group.scheduled = True
            loop.call_soon(self._flush, group)
        try:
            return await member.future
        except asyncio.CancelledError:
            # An error that came in the same turn has nobody left to read it; asyncio would complain.
            _ = member.future.cancelled() or member.future.exception()
            raise
        finally:
            del self._members[member]
            if self._clock is not None and not self._members:
                self._clock.cancel()
                self._clock = None
            self._leave(group, member)

    def close(self) -> None:
        """End what waits to be sent with Cancelled; what is under way ends with its channel."""
        for group in self._groups.values():
            for member in group.waiting:
                _fail(member, Cancelled("the client was closed while the call was waiting to be sent"))

    def _wind(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """Have the clock go off at `deadline` at the latest."""
        if self._clock is not None:
            if self._clock.when() <= deadline:
                return
            self._clock.cancel()
        self._clock = loop.call_at(deadline, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._clock = None
        now = loop.time()
        for member in self._members:
            if member.future.done():
                continue
            if member.deadline <= now:
                _fail(member, no_answer(self._target, member.deadline_s))
            else:
                self._wind(loop, member.deadline)

    def _leave(self, group: _Group, member: _Member) -> None:
        """Take a member out whatever became of it; a call that carries nobody any more is cancelled."""
        if member.batch is None:
            group.waiting.pop(member, None)
            self._forget(group)
        elif not member.batch.task.done() and all(other.future.done() for other in member.batch.members):
            member.batch.task.cancel()

    def _forget(self, group: _Group) -> None:
        if not group.waiting and not group.under_way and not group.scheduled:
            self._groups.pop(group.key, None)

    def _flush(self, group: _Group) -> None:
        """Send what waits, as far as enough calls are not under way already."""
        group.scheduled = False
        while group.waiting and len(group.under_way) < _CALLS_UNDER_WAY:
            members: list[_Member] = []
            rows = 0
            for member in group.waiting:
                if members and rows + member.rows > group.most_rows:
                    break
                members.append(member)
                rows += member.rows
            for member in members:
                del group.waiting[member]
            self._launch(group, members)
        self._forget(group)

    def _launch(self, group: _Group, members: list[_Member]) -> None:
        batch = _Batch(members)
        for member in members:
            member.batch = batch
        group.under_way.add(batch)
        batch.task = asyncio.create_task(self._carry(group, batch))
        batch.task.add_done_callback(lambda _: self._land(group, batch))

    def _land(self, group: _Group, batch: _Batch) -> None:
        group.under_way.discard(batch)
        self._flush(group)

    async def _carry(self, group: _Group, batch: _Batch) -> None:
        """Make the call of one batch, and give each member its own; several that fail go again one by one."""
        members = [member for member in batch.members if not member.future.done()]
        if not members:
            return
        try:
            value = await self._call(members)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer of those who wait
            if len(members) == 1 or _is_everybodys(error):
                for member in members:  # each its own, as each is raised in another task
                    _fail(member, error if len(members) == 1 else copy.copy(error))
            else:
                for member in members:
                    if not member.future.done():
                        self._launch(group, [member])
            return
        start = 0
        for member in members:
            if not member.future.done():
                try:
                    member.future.set_result(value if len(members) == 1 else value[start : start + member.rows])
                except Exception as error:  # noqa: BLE001 - nobody may be left waiting
                    _fail(member, error)
            start += member.rows

    async def _call(self, members: list[_Member]) -> Any:
        job, rows = members[0].job, sum(member.rows for member in members)
        array = members[0].array if len(members) == 1 else np.concatenate([member.array for member in members])
        left_s = max(member.deadline for member in members) - asyncio.get_running_loop().time()
        value = await self._send(job, Part(0, rows, array), max(left_s, 0.0) + _GRACE_S)
        if len(members) > 1 and (counts := _row_counts(value)) != {rows}:
            found = " and ".join(map(str, sorted(counts)))
            raise UnknownError(f"{self._target} answered {rows} rows of {job.operation.method} with {found}")
        return value


def _row_counts(value: Any) -> set[int]:
    """Return the number of rows of each array of an answer: one, or it is unsound."""
    arrays = (getattr(value, field.name) for field in fields(value))
    return {len(array) for array in arrays if isinstance(array, np.ndarray)}


def _is_everybodys(error: Exception) -> bool:
    """Tell whether the failure of one call is that of each of its members."""
    if isinstance(error, ResourceExhausted):  # a full queue is; too many rows for it, or bytes for a message, is not
        return error.retry_after_s is not None
    return isinstance(error, _OF_EVERYBODY)


def _fail(member: _Member, error: Exception) -> None:
    if not member.future.done():
        member.future.set_exception(error)
