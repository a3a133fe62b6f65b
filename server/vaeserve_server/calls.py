"""One call, whatever transport brought it: bytes in, bytes out, or one status. What is counted, logged and told of it.

Transports hand over the request's bytes rather than its message, so that bytes which are no message get the same answer
as any other bad input. Every call has an id, which its caller gets in the trailing metadata beside the timings, and
under which the log and the traces have it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2

from vaeserve.v1 import vae_pb2
from vaeserve_server import status
from vaeserve_server.access import Access, caller
from vaeserve_server.errors import CallError, InvalidInputError, QueueFullError
from vaeserve_server.service import SERVICE_NAME, VaeService
from vaeserve_server.stats import MethodStats, Passage, passages

CALL_ID_KEY = "vaeserve-call-id"
QUEUE_KEY, COMPUTE_KEY, BATCH_ROWS_KEY = "vaeserve-queue-us", "vaeserve-compute-us", "vaeserve-batch-rows"

Metadata = tuple[tuple[str, str], ...]
ReadMetadata = Callable[[], Iterable[tuple[str, str | bytes]] | None]
"""Returns what metadata the caller sent. Called only where somebody wants to know."""

_log = logging.getLogger(__name__)
# A transport that ends a call at its deadline may do so by a clock that is this much ahead of ours.
_CLOCK_S = 0.02
# Who is refused because of the number of calls may come again after this, and up to twice as long.
_RETRY_S = 0.1
_RETRY_STEP_S = 0.005  # of the times after which those may who are refused because a queue is full


class Answer(NamedTuple):
    """The serialised answer, and what goes with it into the trailing metadata."""

    message: bytes
    metadata: Metadata


class CallFailedError(Exception):
    """The call failed with `status`."""

    def __init__(self, status: status.Status) -> None:
        super().__init__(status.message)
        self.status = status


@dataclass(frozen=True)
class Method:
    """One RPC: its service's full name and its own, how its request is parsed, and what answers it.

    One that is refused whatever is sent is not `read`: its request may be a stream, or whatever else. `retry_after_s`
    returns when to come again while any call would find its queue full, whatever it holds, and else None.
    """

    service: str
    name: str
    parse: Callable[[bytes], Any]
    answer: Callable[[Any, float], Awaitable[Message]]  # each verb takes its own request type
    stats: MethodStats
    read: bool = True
    retry_after_s: Callable[[], float | None] = lambda: None


class EndedCall(NamedTuple):
    """A call that is over. Times are time.monotonic()'s; `passages` are its ways through graphs, in order."""

    call_id: str
    service: str
    rpc: str
    code: int
    started: float
    ended: float
    passages: list[Passage]


class Tracer(Protocol):
    """Who is told of every call when it is over."""

    def trace(self, call: EndedCall, read_metadata: ReadMetadata) -> None:
        """Note the call; must not raise."""


class Calls:
    """The calls of all services, over all transports, at most `max_calls` at once. `tracer` is told of each it took."""

    def __init__(self, methods: Sequence[Method], access: Access, max_calls: int) -> None:
        self.methods = methods
        self.services = list(dict.fromkeys(method.service for method in methods))
        self.tracer: Tracer | None = None
        self.access = access
        self.max_calls = max_calls
        self._id_prefix = secrets.token_hex(5)
        self._numbers = itertools.count()
        self._in_flight = 0
        self._refusals = itertools.cycle(_refusals(max_calls))
        self._idle = asyncio.Event()  # kept only once somebody waits for it
        self._awaited = False

    def stats(self) -> list[MethodStats]:
        """Return what is counted of the methods, which may share one count."""
        return list(dict.fromkeys(method.stats for method in self.methods))

    def refusal(self, method: Method) -> status.Status | None:
        """Return the status of a call that is refused unread, and count it; None if it is to be read.

        Costs little: time is short when it happens.
        """
        if self._in_flight >= self.max_calls:
            refusal = next(self._refusals)
        elif (retry_after_s := method.retry_after_s()) is not None:
            refusal = _queue_full(math.ceil(retry_after_s / _RETRY_STEP_S))
        else:
            return None
        _count_refusal(method.stats)
        return refusal

    def unfinished(self, method: Method, in_hand: int) -> status.Status:
        """Return the status of a call whose request takes too long to come, and count it."""
        _count_refusal(method.stats)
        words = f"the request did not come to its end while the server had {in_hand} calls in hand; it takes"
        wait_s = _RETRY_S * (1 + random.random())
        return status.of_error(QueueFullError(f"{words} {self.max_calls}; try again in {wait_s:.3f} s", wait_s))

    async def answer(
        self, method: Method, payload: bytes, remaining_s: float | None, read_metadata: ReadMetadata
    ) -> Answer:
        """Return the serialised answer; CallFailedError with its status if there is none.

        `remaining_s` is the time until the caller's deadline, None without one. Cancelling takes the call's rows out of
        the queue.
        """
        refusal = self.refusal(method)  # for what came since the transport asked
        if refusal is not None:
            raise CallFailedError(refusal)
        started = time.monotonic()
        deadline = math.inf if remaining_s is None else started + remaining_s
        call_id = self._new_id()
        went: list[Passage] = []
        passages.set(went)
        self._in_flight += 1
        method.stats.started += 1
        code = code_pb2.INTERNAL
        try:
            message = (await method.answer(_parse(method, payload), deadline)).SerializeToString()
            code = code_pb2.OK
            return Answer(message, self._trailers(call_id, went))
        except CallError as error:
            method.stats.refused += isinstance(error, QueueFullError)
            failure = status.of_error(error)
            code = failure.code
            raise CallFailedError(failure.with_metadata(self._trailers(call_id, went))) from None
        except asyncio.CancelledError:
            expired = time.monotonic() > deadline - _CLOCK_S
            code = code_pb2.DEADLINE_EXCEEDED if expired else code_pb2.CANCELLED
            raise
        except Exception:  # noqa: BLE001 - the caller hears nothing of it but the id
            _log.exception("call failed", extra={"fields": {"call_id": call_id, "rpc": method.name}})
            raise CallFailedError(status.of_fault(call_id).with_metadata(self._trailers(call_id, went))) from None
        finally:
            self._in_flight -= 1
            if self._awaited and not self._in_flight:
                self._idle.set()
            ended = EndedCall(call_id, method.service, method.name, code, started, time.monotonic(), went)
            _count(method.stats, ended)
            if self.tracer is not None:
                self.tracer.trace(ended, read_metadata)
            if _log.isEnabledFor(logging.DEBUG):
                _log_call(ended, len(payload))

    def admit(self, path: str, read_metadata: ReadMetadata) -> None:
        """Let a call of `path`, "/package.Service/Method", pass; CallFailedError if its caller may not make it.

        To be asked before anything of the call is read but its headers, whatever the method, be there one or not.
        """
        if self.access.tokens is None:
            return
        try:
            self.access.check(path.removeprefix("/"), read_metadata())
        except CallError as error:
            now = time.monotonic()
            call_id = self._new_id()
            failure = status.of_error(error)
            service, _, rpc = path.removeprefix("/").rpartition("/")
            ended = EndedCall(call_id, service, rpc, failure.code, now, now, [])
            for method in self.methods:
                if path == f"/{method.service}/{method.name}":
                    method.stats.started += 1
                    _count(method.stats, ended)
            if _log.isEnabledFor(logging.DEBUG):
                _log_call(ended, 0)
            raise CallFailedError(failure.with_metadata(self._trailers(call_id, []))) from None

    async def wait_idle(self) -> None:
        """Wait until no call is in flight; for a drain, when no more come."""
        self._awaited = True
        if self._in_flight:
            await self._idle.wait()

    def _new_id(self) -> str:
        return f"{self._id_prefix}{next(self._numbers):06x}"

    def _trailers(self, call_id: str, went: list[Passage]) -> Metadata:
        """Return what the caller learns of its call: the id, and in microseconds where its time went."""
        if not went:
            return ((CALL_ID_KEY, call_id),)
        queue_s = compute_s = 0.0
        batch_rows = 0
        for passage in went:
            queue_s += (passage.started or time.monotonic()) - passage.submitted
            compute_s += passage.compute_s
            batch_rows = max(batch_rows, passage.batch_rows)
        return (
            (CALL_ID_KEY, call_id),
            (QUEUE_KEY, f"{queue_s * 1e6:.0f}"),
            (COMPUTE_KEY, f"{compute_s * 1e6:.0f}"),
            (BATCH_ROWS_KEY, str(batch_rows)),
        )


def _refusals(max_calls: int) -> list[status.Status]:
    """Return refusals that differ in when to come again, or all who were refused together come back together."""
    words = f"the server has {max_calls} calls in hand, as many as it takes; try again in"
    waits_s = [_RETRY_S * (1 + step / 16) for step in range(16)]
    random.shuffle(waits_s)
    return [status.of_error(QueueFullError(f"{words} {wait_s:.3f} s", wait_s)) for wait_s in waits_s]


@lru_cache(maxsize=2048)
def _queue_full(steps: int) -> status.Status:
    wait_s = steps * _RETRY_STEP_S
    return status.of_error(QueueFullError(f"the queue is full; try again in {wait_s:.3f} s", wait_s))


def native_methods(service: VaeService) -> list[Method]:
    """Return the methods of vaeserve's own contract."""
    return [
        _native("Encode", vae_pb2.EncodeRequest.FromString, service.encode, service.retry_encode_s),
        _native("Decode", vae_pb2.DecodeRequest.FromString, service.decode, service.retry_decode_s),
        _native("Sample", vae_pb2.SampleRequest.FromString, service.sample, service.retry_decode_s),
        _native("GetModel", vae_pb2.GetModelRequest.FromString, service.get_model),
        _native("ListModels", vae_pb2.ListModelsRequest.FromString, service.list_models),
    ]


def _native(
    name: str,
    parse: Callable[[bytes], Any],
    answer: Callable[[Any, float], Awaitable[Message]],
    retry_after_s: Callable[[], float | None] = lambda: None,
) -> Method:
    return Method(SERVICE_NAME, name, parse, answer, MethodStats(name), retry_after_s=retry_after_s)


def _count_refusal(stats: MethodStats) -> None:
    stats.started += 1
    stats.refused += 1
    stats.codes[code_pb2.RESOURCE_EXHAUSTED] += 1


def _count(stats: MethodStats, call: EndedCall) -> None:
    stats.codes[call.code] += 1
    stats.duration_s.observe(call.ended - call.started)
    if call.passages and call.code == code_pb2.OK:
        last = call.passages[-1]
        last.graph.rows_by_rpc[call.rpc] = last.graph.rows_by_rpc.get(call.rpc, 0) + last.rows


def _log_call(call: EndedCall, request_bytes: int) -> None:
    fields = {
        "call_id": call.call_id,
        "rpc": call.rpc,
        "code": code_pb2.Code.Name(call.code),
        "request_bytes": request_bytes,
        "ms": round((call.ended - call.started) * 1000, 3),
    }
    if caller.get():
        fields["caller"] = caller.get()
    _log.debug("call", extra={"fields": fields})


def _parse(method: Method, payload: bytes) -> Any:
    try:
        return method.parse(payload)
    except DecodeError:
        raise InvalidInputError("", f"the request's {len(payload)} bytes are no {method.name}Request message") from None
