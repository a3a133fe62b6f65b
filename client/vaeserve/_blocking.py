"""How the blocking client waits: flows driven over grpc's threaded stubs."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2_grpc

from vaeserve import _calls, _channel
from vaeserve._calls import Job, Part
from vaeserve._flows import Ask, AskAll, AskPart, Fit, Flow, Flows, Wanted
from vaeserve._progress import Report, reporting
from vaeserve._results import Answer
from vaeserve.errors import Cancelled, VaeserveError, count_rows_from

_Value = TypeVar("_Value", bound=Answer)
_T = TypeVar("_T")

_CLOSE_S = 1.0


class BlockingTransport(Flows):
    """Everything of the blocking client but its verbs."""

    def _open(self) -> None:
        self._channels = [_channel.open_blocking(self._settings) for _ in range(self._settings.connections)]
        self._stubs = itertools.cycle([_channel.stub(channel) for channel in self._channels])
        self._health = health_pb2_grpc.HealthStub(self._channels[0])

    def close(self) -> None:
        """Close the connections; calls under way in other threads end with Cancelled."""
        self._closed = True
        # grpc's close waits for every call to be finished, and a Ctrl-C that strikes while grpc begins one leaves a
        # call that nobody will ever finish. So the wait is somebody else's, and has an end.
        closing = threading.Thread(target=self._close_channels, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def _close_channels(self) -> None:
        for channel in self._channels:
            channel.close()

    def _drive(self, flow: Flow[_T], timeout_s: float | None) -> _T:
        deadline_s = self._deadline_s(timeout_s)
        try:
            wanted = flow.send(None)
            while True:
                wanted = flow.send(self._perform(wanted, deadline_s))
        except StopIteration as stop:
            result: _T = stop.value
            return result

    def _perform(self, wanted: Wanted, deadline_s: float) -> Any:
        if isinstance(wanted, AskPart):
            return self._send_part(wanted.job, wanted.part, deadline_s)
        if isinstance(wanted, Ask):
            return self._send(wanted.method, wanted.request, deadline_s)
        if isinstance(wanted, AskAll):
            return list(self._bulk(wanted.job, wanted.parts, deadline_s))
        return list(self._stream(wanted.job, wanted.fit, wanted.items, deadline_s))

    def _send(self, method: str, request: Any, deadline_s: float) -> Any:
        try:
            return getattr(next(self._stubs), method)(request, deadline_s, self._metadata)
        except (grpc.RpcError, ValueError) as error:
            raise self._translate(error, deadline_s) from None

    def _send_part(self, job: Job[_Value], part: Part, deadline_s: float) -> _Value:
        return job.operation.result(self._send(job.operation.method, job.request(part), deadline_s))

    def _translate(self, error: Exception, deadline_s: float) -> Exception:
        """Return what to raise for an exception of grpc; ValueError is its word for a closed channel."""
        if isinstance(error, grpc.RpcError):
            return self._failure(error, deadline_s)
        if isinstance(error, grpc.FutureCancelledError):
            return Cancelled("the call was cancelled")
        return self._closed_error() if self._closed else error

    def _stream(self, job: Job[_Value], fit: Fit, items: Iterable[Any], deadline_s: float) -> Iterator[_Value]:
        """Yield the answers for an iterator of rows, each in arrays of its own."""
        for value in self._bulk(job, self._cut(job, fit, items, deadline_s), deadline_s):
            yield job.operation.join([value])

    def _cut(self, job: Job[Any], fit: Fit, items: Iterable[Any], deadline_s: float) -> Iterator[Part]:
        cutter = _calls.Cutter()
        for item in items:
            job.narrow(item)
            info, array = self._drive(self._fit(fit, item, job.asked), deadline_s)
            yield from cutter.push(array, self._rows(job.operation, info, array))
        yield from cutter.flush()

    def _bulk(self, job: Job[_Value], parts: Iterable[Part], deadline_s: float) -> Iterator[_Value]:
        """Yield the answers of all parts in order, in views of their messages, with several calls in flight."""
        window: deque[tuple[Part, Any]] = deque()
        with reporting(job.progress, job.operation.method.lower(), job.total_rows) as report:
            try:
                for part in parts:
                    window.append((part, self._start(job, part, deadline_s)))
                    if len(window) >= self._calls_in_flight:
                        yield self._finish(job, *window.popleft(), deadline_s, report)
                while window:
                    yield self._finish(job, *window.popleft(), deadline_s, report)
            finally:
                for _, call in window:
                    call.cancel()

    def _start(self, job: Job[Any], part: Part, deadline_s: float) -> Any:
        try:
            return getattr(next(self._stubs), job.operation.method).future(
                job.request(part), deadline_s, self._metadata
            )
        except ValueError as error:
            raise self._translate(error, deadline_s) from None

    def _finish(self, job: Job[_Value], part: Part, call: Any, deadline_s: float, report: Report) -> _Value:
        try:
            value = job.operation.result(self._result(call, deadline_s))
            if not job.accept(value.model):
                value = self._send_part(job, part, deadline_s)
                job.insist(value.model)
        except VaeserveError as error:
            raise count_rows_from(error, part.start) from None
        report(part.start + part.rows, job.total_rows)
        return value

    def _result(self, call: Any, deadline_s: float) -> Any:
        try:
            return call.result()
        except (grpc.RpcError, grpc.FutureCancelledError) as error:
            raise self._translate(error, deadline_s) from None

    def _check_health(self, deadline_s: float) -> bool:
        try:
            answer = self._health.Check(_channel.HEALTH_REQUEST, timeout=deadline_s, metadata=self._metadata)
        except (grpc.RpcError, ValueError) as error:
            return self._unhealthy(self._translate(error, deadline_s))
        return bool(answer.status == _channel.SERVING)

    def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        heard = ""
        while (left_s := deadline - time.monotonic()) > 0:
            watch = None
            try:
                watch = self._health.Watch(
                    _channel.HEALTH_REQUEST, timeout=left_s, metadata=self._metadata, wait_for_ready=True
                )
                for answer in watch:
                    if answer.status == _channel.SERVING:
                        return
                    heard = _channel.status_name(answer)
            except (grpc.RpcError, ValueError) as error:
                self._unhealthy(self._translate(error, timeout_s))
            finally:
                if watch is not None:
                    watch.cancel()
            time.sleep(max(0.0, min(_channel.WATCH_AGAIN_S, deadline - time.monotonic())))
        raise self._not_ready(timeout_s, heard)
