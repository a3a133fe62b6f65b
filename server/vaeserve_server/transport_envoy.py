"""Envoy in front of the service: each call is an HTTP/2 stream that pyvoy hands over as ASGI events, and gRPC is ours.

pyvoy runs this process's Python inside Envoy, whose threads do the network; on the event loop a call costs a fraction
of what it costs behind grpcio. Three things differ from ASGI's book, and this file knows them:

- `receive()` does not wait for a disconnect once the request is complete. Envoy writes the id of each stream that ended
  before its answer to a pipe (its access log), and reading one cancels that call.
- `send()` acts when it is called, so a status can still be sent by a task that is being cancelled. Awaiting what it
  returns suspends only after a part of an answer with more to come, on a future that pyvoy completes, whether or not
  somebody still waits for it.
- A `receive()` that was cancelled is complained of when its stream ends; `quiet_loop_errors` drops that complaint.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any, NoReturn, Protocol

import grpc
from google.rpc import code_pb2

from vaeserve_server import grpc_wire, health, standard, status
from vaeserve_server.calls import CallFailedError, Calls, Metadata, Method
from vaeserve_server.stats import MethodStats
from vaeserve_server.unfinished import Unfinished

STREAM_ID_HEADER = "x-vaeserve-stream"

_Event = dict[str, Any]
_Receive = Callable[[], Awaitable[_Event]]
_Send = Callable[[_Event], Awaitable[None]]

_STREAM_ID = STREAM_ID_HEADER.encode()
_HEADERS = [(b"content-type", b"application/grpc"), (b"grpc-accept-encoding", grpc_wire.ACCEPTED_ENCODINGS)]
_START = {"type": "http.response.start", "status": 200, "headers": _HEADERS, "trailers": True}
_OK = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}
_EXPIRED = status.Status(code_pb2.DEADLINE_EXCEEDED, "Deadline Exceeded", ())
_LAST_BYTES_S = 1.0
_READ_BYTES = 65536
_PYVOY = "_pyvoy.asgi"  # in the name by which the event loop calls what pyvoy has it run

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """What listens for the transport: the Envoy around it."""

    async def wait_listening(self) -> int:
        """Wait until calls can come, and return the port."""

    async def stop_listening(self) -> None:
        """Take no more connections, and tell those that are open to send their next calls elsewhere."""

    async def wait_flushed(self) -> None:
        """Wait until every answer is on its way."""

    async def renew_tls(self) -> None:
        """Show new connections the certificate that is in the files now; TlsError if that cannot be."""

    def refused_calls(self) -> int:
        """Return how many calls it has refused by itself. Called in other threads."""


class GoneError(Exception):
    """The caller is gone; nobody is left to answer."""


class EnvoyTransport:
    """The ASGI application for streams: `start`, `refuse`, `close`, once each."""

    def __init__(self, calls: Calls, health_service: health.Health, max_message_bytes: int, listener: Listener) -> None:
        self._calls = calls
        self._max_message_bytes = max_message_bytes
        self._listener = listener
        self._streams: dict[bytes, Stream] = {}
        self._unlimited = 0  # of the streams: those of health and reflection, which Envoy does not count
        self._unfinished = Unfinished(calls, lambda: len(self._streams) - self._unlimited)
        self._idle = asyncio.Event()
        self._methods = {f"/{method.service}/{method.name}": method for method in calls.methods}
        self._standard = standard.handlers(health_service, calls.services)

    async def start(self, host: str, port: int) -> int:
        """Return the port once Envoy listens; where and how it does was settled when Envoy was started."""
        return await self._listener.wait_listening()

    async def renew_tls(self) -> None:
        """Show new connections the certificate that is in the files now; TlsError if that cannot be."""
        await self._listener.renew_tls()

    def stats(self) -> list[MethodStats]:
        """Count the calls that Envoy refuses, of whatever RPC: they never come to `Calls`."""
        refused = MethodStats("any")
        refused.started = refused.refused = refused.codes[code_pb2.RESOURCE_EXHAUSTED] = self._listener.refused_calls()
        return [refused]

    def refuse(self) -> None:
        """Take no more connections, and send clients elsewhere; what is in flight goes on."""
        self._refusing = asyncio.create_task(self._listener.stop_listening())

    async def close(self) -> None:
        """After `refuse`: give answers a moment to be sent, and cut off what is left, streams above all."""
        await self._refusing
        await self._wait_ended()
        for stream in list(self._streams.values()):
            stream.end(_status(code_pb2.UNAVAILABLE, "the server is shutting down; try another one"))
        await self._wait_ended()
        await self._listener.wait_flushed()

    def watch_ended(self, ended_fd: int) -> None:
        """Cancel the calls of the streams whose ids come through a pipe, one a line. Call on the event loop."""
        asyncio.get_running_loop().add_reader(ended_fd, _EndedReader(ended_fd, self._streams).read)

    async def __call__(self, scope: _Event, receive: _Receive, send: _Send) -> None:
        """Answer one stream."""
        headers = dict(scope["headers"])
        stream_id = headers.get(_STREAM_ID, b"")
        self._streams[stream_id] = stream = Stream(receive, send, self._max_message_bytes)
        try:
            await self._answer(scope, headers, stream)
        except (GoneError, OSError):
            pass  # OSError: ASGI's way to say from send() that the caller is gone
        except asyncio.CancelledError:
            if stream.verdict is not None:
                stream.fail(stream.verdict)
        except CallFailedError as failure:
            stream.fail(failure.status)
        except grpc_wire.WireError as error:
            stream.fail(_status(error.code, str(error)))
        except Exception:  # noqa: BLE001 - the caller hears nothing of it but the id
            call_id = secrets.token_hex(8)
            _log.exception("stream failed", extra={"fields": {"call_id": call_id, "path": scope["path"]}})
            stream.fail(status.of_fault(call_id))
        finally:
            stream.stop_clock()
            del self._streams[stream_id]
            if not self._streams:
                self._idle.set()

    async def _answer(self, scope: _Event, headers: dict[bytes, bytes], stream: Stream) -> None:
        if not grpc_wire.is_grpc(headers.get(b"content-type", b"")):
            stream.refuse_http(415)
            return
        if headers.get(b"te") != b"trailers":  # without it Envoy sends none, and the status stands in them
            raise grpc_wire.WireError(code_pb2.INTERNAL, "the request lacks the header `te: trailers`")
        read_metadata = partial(_sent_metadata, scope["headers"])
        self._calls.admit(scope["path"], read_metadata)
        timeout = headers.get(b"grpc-timeout")
        timeout_s = None if timeout is None else grpc_wire.timeout_s(timeout)
        if timeout_s is not None:
            stream.start_clock(timeout_s)
        stream.encoding = headers.get(b"grpc-encoding", b"identity")
        grpc_wire.check_encoding(stream.encoding)
        method = self._methods.get(scope["path"])
        if method is None:
            self._unlimited += 1
            try:
                await self._answer_standard(scope["path"], stream)
            finally:
                self._unlimited -= 1
        else:
            refusal = self._calls.refusal(method) if method.read else None
            if refusal is not None:
                raise CallFailedError(refusal)
            payload = await self._read(stream, method) if method.read else b""
            answer = await self._calls.answer(method, payload, stream.remaining_s(), read_metadata)
            stream.reply(answer.message, answer.metadata)

    async def _read(self, stream: Stream, method: Method) -> bytes:
        self._unfinished.begin(stream, method)
        try:
            return await stream.only_message()
        finally:
            self._unfinished.done(stream)

    async def _answer_standard(self, path: str, stream: Stream) -> None:
        """Answer health and reflection by their grpcio handlers."""
        handler = self._standard.get(path)
        if handler is None:
            raise grpc_wire.WireError(code_pb2.UNIMPLEMENTED, f"Method not found! {path}")
        if handler.request_streaming:
            requests = (standard.parsed(handler, payload) async for payload in stream.messages())
            await stream.reply_all(handler, handler.stream_stream(requests, _CONTEXT))
            return
        request = standard.parsed(handler, await stream.only_message())
        if handler.response_streaming:
            await stream.reply_all(handler, handler.unary_stream(request, _CONTEXT))
        else:
            stream.reply(handler.response_serializer(await handler.unary_unary(request, _CONTEXT)))

    async def _wait_ended(self) -> None:
        self._idle.clear()
        if self._streams:
            ended = asyncio.create_task(self._idle.wait())
            await asyncio.wait({ended}, timeout=_LAST_BYTES_S)
            ended.cancel()


class Stream:
    """One call's HTTP/2 stream: messages in, messages and one status out."""

    __slots__ = ("_clock", "_max_message_bytes", "_receive", "_send", "_started", "_task", "encoding", "verdict")

    def __init__(self, receive: _Receive, send: _Send, max_message_bytes: int) -> None:
        self._receive = receive
        self._send = send
        self._max_message_bytes = max_message_bytes
        self._task = asyncio.current_task()
        self._clock: asyncio.TimerHandle | None = None
        self._started = False
        self.encoding = b"identity"
        self.verdict: status.Status | None = None

    def end(self, verdict: status.Status | None) -> None:
        """Stop working on the call, and answer `verdict`, or nothing where nobody is left to hear it."""
        self.verdict = verdict
        if self._task is not None:
            self._task.cancel()

    def start_clock(self, timeout_s: float) -> None:
        """End the call when its time is over."""
        if timeout_s <= 0:
            raise CallFailedError(_EXPIRED)
        self._clock = asyncio.get_running_loop().call_later(timeout_s, self.end, _EXPIRED)

    def remaining_s(self) -> float | None:
        """Return the time until the clock ends the call; None if it never does."""
        return None if self._clock is None else self._clock.when() - asyncio.get_running_loop().time()

    def stop_clock(self) -> None:
        """Let the call's time be."""
        if self._clock is not None:
            self._clock.cancel()

    async def only_message(self) -> bytes:
        """Return the message of a request that has exactly one."""
        chunk, more = await self._chunk()
        if not more and (message := grpc_wire.sole_message(chunk, self._max_message_bytes)) is not None:
            return message
        deframer = grpc_wire.Deframer(self._max_message_bytes, sole=True)
        frames = deframer.feed(chunk)
        while more:
            chunk, more = await self._chunk()
            frames += deframer.feed(chunk)
        deframer.finish()
        if not frames:
            raise grpc_wire.WireError(code_pb2.INTERNAL, "the request has no message; the method takes one")
        return await self._content(frames[0])

    async def messages(self) -> AsyncIterator[bytes]:
        """Yield the messages of a request as they come."""
        deframer = grpc_wire.Deframer(self._max_message_bytes)
        more = True
        while more:
            chunk, more = await self._chunk()
            for frame in deframer.feed(chunk):
                yield await self._content(frame)
        deframer.finish()

    def reply(self, message: bytes, metadata: Metadata = ()) -> None:
        """Send the only message of an answer, and that all went well."""
        self._send(_START)
        self._send({"type": "http.response.body", "body": grpc_wire.frame(message)})
        self._started = True
        self._send({"type": "http.response.trailers", "headers": grpc_wire.status_headers(0, "", metadata)})

    async def reply_all(self, handler: Any, responses: AsyncIterator[Any]) -> None:
        """Send messages as they come, as fast as the caller takes them, and that all went well."""
        await self._send(_START)
        self._started = True
        async for response in responses:
            await self._send_part(grpc_wire.frame(handler.response_serializer(response)))
        await self._send({"type": "http.response.body", "body": b""})
        await self._send(_OK)

    def fail(self, failure: status.Status) -> None:
        """Send a status other than OK."""
        headers = grpc_wire.status_headers(failure.code, failure.message, failure.metadata)
        if self._started:
            self._send({"type": "http.response.body", "body": b""})
            self._send({"type": "http.response.trailers", "headers": headers})
        else:
            self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})
            self._send({"type": "http.response.body", "body": b""})

    def refuse_http(self, http_status: int) -> None:
        """Answer what is no gRPC call."""
        self._send({"type": "http.response.start", "status": http_status, "headers": []})
        self._send({"type": "http.response.body", "body": b""})

    async def _send_part(self, body: bytes) -> None:
        sending = asyncio.ensure_future(self._send({"type": "http.response.body", "body": body, "more_body": True}))
        # pyvoy could not complete it if this task, when it is cancelled, took it along; so nobody may be left to look.
        sending.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({sending})  # a shield would complain, from Python 3.14 on, of what fails after the task
        sending.result()

    async def _chunk(self) -> tuple[bytes, bool]:
        event = await self._receive()
        if event["type"] != "http.request":
            raise GoneError
        return event["body"], event["more_body"]

    async def _content(self, frame: grpc_wire.Frame) -> bytes:
        if not frame.compressed:
            return frame.data
        if self.encoding != b"gzip":
            raise grpc_wire.WireError(code_pb2.INTERNAL, "a message is compressed but the call names no grpc-encoding")
        return await grpc_wire.unpacked(frame.data, self._max_message_bytes) if frame.data else b""


class _Context:
    """The part of grpcio's context that the health service uses."""

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with a status."""
        raise CallFailedError(_status(code.value[0], details))


_CONTEXT = _Context()


class _EndedReader:
    def __init__(self, ended_fd: int, streams: dict[bytes, Stream]) -> None:
        self._fd = ended_fd
        self._streams = streams
        self._rest = b""

    def read(self) -> None:
        """Cancel the calls whose ids have come."""
        *ids, self._rest = (self._rest + os.read(self._fd, _READ_BYTES)).split(b"\n")
        for stream_id in ids:
            stream = self._streams.get(stream_id)
            if stream is not None:
                stream.end(None)


def quiet_loop_errors(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle the event loop's errors, save pyvoy's complaint that the caller of a cancelled receive() is gone."""
    if isinstance(context.get("exception"), asyncio.InvalidStateError) and _PYVOY in context["message"]:
        return
    loop.default_exception_handler(context)


def _sent_metadata(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str | bytes]]:
    """Return the caller's metadata as grpcio gives it, without that in bytes, which nothing here asks for."""
    return [(key.decode("latin-1"), value.decode("latin-1")) for key, value in headers]


def _status(code: int, message: str) -> status.Status:
    return status.Status(code, message, ())
