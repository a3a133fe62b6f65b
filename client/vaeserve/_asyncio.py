"""How the asyncio client waits: flows driven over grpc.aio's stubs."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from vaeserve import _calls, _channel
from vaeserve._calls import Job, Part
from vaeserve._coalesce import Coalescer
from vaeserve._flows import Ask, AskAll, AskPart, Fit, Flow, Flows, Wanted
from vaeserve._progress import Report, reporting
from vaeserve._results import Answer
from vaeserve.errors import Cancelled, VaeserveError, count_rows_from

_Value = TypeVar("_Value", bound=Answer)
_T = TypeVar("_T")


class AsyncioTransport(Flows):
    """Everything of the asyncio client but its verbs."""

    _coalescer: Coalescer | None = None

    def _open(self) -> None:
        # A grpc.aio channel belongs to the event loop it is made in; a client may be made before there is one.
        self._channels: list[grpc.aio.Channel] = []

    async def close(self) -> None:
        """Close the connections; calls under way in other tasks end with Cancelled."""
        self._closed = True
        if self._coalescer:
            self._coalescer.close()
        for channel in self._channels:
            await channel.close(None)

    def _connect(self) -> None:
        if self._closed:
            raise self._closed_error()
        if not self._channels:
            self._channels = [_channel.open_asyncio(self._settings) for _ in range(self._settings.connections)]
            self._stubs = itertools.cycle([_channel.stub(channel) for channel in self._channels])
            self._health = health_pb2_grpc.HealthStub(self._channels[0])

    async def _drive(self, flow: Flow[_T], timeout_s: float | None) -> _T:
        deadline_s = self._deadline_s(timeout_s)
        try:
            wanted = flow.send(None)
            while True:
                wanted = flow.send(await self._perform(wanted, deadline_s))
        except StopIteration as stop:
            result: _T = stop.value
            return result

    async def _perform(self, wanted: Wanted, deadline_s: float) -> Any:
        if isinstance(wanted, Ask):
            return await self._send(wanted.method, wanted.request, deadline_s)
        if isinstance(wanted, AskPart):
            job, part, info = wanted
            if self._coalescer and job.operation.merges and part.rows:
                most_rows = self._rows(job.operation, info, part.array)
                return await self._coalescer.ask(job, part, most_rows, deadline_s)
            return await self._send_part(job, part, deadline_s)
        if isinstance(wanted, AskAll):
            values = self._bulk(wanted.job, _iterate(wanted.parts), deadline_s)
        else:
            values = self._stream(wanted.job, wanted.fit, wanted.items, deadline_s)
        async with aclosing(values):
            return [value async for value in values]

    async def _send(self, method: str, request: Any, deadline_s: float) -> Any:
        self._connect()
        try:
            return await getattr(next(self._stubs), method)(request, timeout=deadline_s, metadata=self._metadata)
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            raise self._translate(error, deadline_s) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):  # nobody cancelled this task: close() ended the call
                raise Cancelled("the client was closed while the call was under way") from None
            raise

    async def _send_part(self, job: Job[_Value], part: Part, deadline_s: float) -> _Value:
        return job.operation.result(await self._send(job.operation.method, job.request(part), deadline_s))

    def _translate(self, error: Exception, deadline_s: float) -> Exception:
        """Return what to raise for an exception of grpc.aio; UsageError is its word for a closed channel."""
        if isinstance(error, grpc.RpcError):
            return self._failure(error, deadline_s)
        return self._closed_error() if self._closed else error

    async def _stream(
        self, job: Job[_Value], fit: Fit, items: Iterable[Any] | AsyncIterable[Any], deadline_s: float
    ) -> AsyncGenerator[_Value, None]:
        """Yield the answers for an iterator of rows, each in arrays of its own."""
        async with aclosing(self._bulk(job, self._cut(job, fit, items, deadline_s), deadline_s)) as values:
            async for value in values:
                yield job.operation.join([value])

    async def _cut(
        self, job: Job[Any], fit: Fit, items: Iterable[Any] | AsyncIterable[Any], deadline_s: float
    ) -> AsyncGenerator[Part, None]:
        cutter = _calls.Cutter()
        async for item in items if isinstance(items, AsyncIterable) else _iterate(items):
            job.narrow(item)
            info, array = await self._drive(self._fit(fit, item, job.asked), deadline_s)
            for part in cutter.push(array, self._rows(job.operation, info, array)):
                yield part
        for part in cutter.flush():
            yield part

    async def _bulk(
        self, job: Job[_Value], parts: AsyncGenerator[Part, None], deadline_s: float
    ) -> AsyncGenerator[_Value, None]:
        """Yield the answers of all parts in order, in views of their messages, with several calls in flight."""
        window: deque[tuple[Part, asyncio.Task[_Value]]] = deque()
        with reporting(job.progress, job.operation.method.lower(), job.total_rows) as report:
            try:
                async with aclosing(parts):
                    async for part in parts:
                        window.append((part, asyncio.create_task(self._finish(job, part, deadline_s))))
                        if len(window) >= self._calls_in_flight:
                            yield await _take(window, report, job.total_rows)
                while window:
                    yield await _take(window, report, job.total_rows)
            finally:
                for _, task in window:
                    task.cancel()
                await asyncio.gather(*(task for _, task in window), return_exceptions=True)

    async def _finish(self, job: Job[_Value], part: Part, deadline_s: float) -> _Value:
        try:
            value = await self._send_part(job, part, deadline_s)
            if not job.accept(value.model):
                value = await self._send_part(job, part, deadline_s)
                job.insist(value.model)
        except VaeserveError as error:
            raise count_rows_from(error, part.start) from None
        return value

    async def _check_health(self, deadline_s: float) -> bool:
        self._connect()
        try:
            answer = await self._health.Check(_channel.HEALTH_REQUEST, timeout=deadline_s, metadata=self._metadata)
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            return self._unhealthy(self._translate(error, deadline_s))
        return bool(answer.status == _channel.SERVING)

    async def _wait_ready(self, timeout_s: float) -> None:
        self._connect()
        deadline = time.monotonic() + timeout_s
        heard = ""
        while (left_s := deadline - time.monotonic()) > 0:
            watch = self._health.Watch(
                _channel.HEALTH_REQUEST, timeout=left_s, metadata=self._metadata, wait_for_ready=True
            )
            try:
                async for answer in watch:
                    if answer.status == _channel.SERVING:
                        return
                    heard = _channel.status_name(answer)
            except (grpc.RpcError, grpc.aio.UsageError) as error:
                self._unhealthy(self._translate(error, timeout_s))
            finally:
                watch.cancel()
            await asyncio.sleep(max(0.0, min(_channel.WATCH_AGAIN_S, deadline - time.monotonic())))
        raise self._not_ready(timeout_s, heard)


async def _take(window: deque[tuple[Part, asyncio.Task[_Value]]], report: Report, total_rows: int | None) -> _Value:
    """Return the oldest call's value; it stays in the window, to be cancelled with the rest, until it is there."""
    part, task = window[0]
    value = await task
    window.popleft()
    report(part.start + part.rows, total_rows)
    return value


async def _iterate(items: Iterable[Any]) -> AsyncGenerator[Any, None]:
    for item in items:
        yield item
