"""grpcio's asyncio server in front of the service: the calls, the standard health service, and reflection.

grpcio would unpack a compressed message whole before it looks at the limit, and a megabyte of gzip can be a gigabyte.
So that is off, and messages are unpacked here, never further than the limit.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, cast

import grpc
import grpc.aio

from vaeserve_server import grpc_access, grpc_wire, health, standard
from vaeserve_server.addresses import address, check_free
from vaeserve_server.calls import CallFailedError, Calls, Method
from vaeserve_server.connections import (
    AGE_GRACE_S,
    HANDSHAKE_S,
    MAX_STREAMS,
    MIN_CLIENT_PING_S,
    ConnectionLimits,
)
from vaeserve_server.errors import ListenError
from vaeserve_server.stats import MethodStats
from vaeserve_server.tls import Tls

_Context = grpc.aio.ServicerContext[Any, Any]
_Unpack = Callable[[bytes], Awaitable[bytes]]
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_LAST_BYTES_S = 1.0
# grpcio 1.81 crashes if the grace of one stop() ends while another one completes, so the only grace never ends.
_FOREVER_S = 1e6
_IDENTITY_AND_GZIP = 0b101  # grpcio's bits; deflate data could not be told from a message


def _is_no_gone_caller(record: logging.LogRecord) -> bool:
    """Tell whether a line of grpcio's is not its complaint, with a traceback, that a caller left before its answer."""
    return not str(record.msg).startswith("ExecuteBatchError raised in core by servicer method")


_GRPCIO_LOG = logging.getLogger("grpc._cython.cygrpc")


class GrpcTransport:
    """One listening port: `start`, `refuse`, `close`, once each."""

    def __init__(
        self,
        calls: Calls,
        health_service: health.Health,
        max_message_bytes: int,
        *,
        limits: ConnectionLimits,
        share_port: bool = False,
        tls: Tls | None = None,
    ) -> None:
        """Serve `calls`, encrypted if there is `tls`.

        `share_port` lets other processes listen on the same port, each with its share of clients.
        """
        self._tls = tls
        _GRPCIO_LOG.addFilter(_is_no_gone_caller)
        self._server = grpc.aio.server(
            interceptors=[grpc_access.Gate(calls)] if calls.access.tokens else None,
            options=[
                # Unless it is wanted: or a second server starts on the same port and takes half of the calls.
                ("grpc.so_reuseport", int(share_port)),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),  # the row limit bounds answers
                *_channel_arguments(limits),
                ("grpc.per_message_decompression", 0),
                ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_AND_GZIP),
            ],
        )

        async def unpack(payload: bytes) -> bytes:
            return await grpc_wire.content(payload, max_message_bytes)

        handlers = {f"/{method.service}/{method.name}": _handler(calls, method, unpack) for method in calls.methods}
        of_standard = standard.handlers(health_service, calls.services)
        handlers |= {path: _standard(handler, unpack) for path, handler in of_standard.items()}
        self._server.add_generic_rpc_handlers([_ByPath(handlers, calls)])

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port; ListenError if it cannot be had."""
        try:
            if self._tls is None:
                bound_port = self._server.add_insecure_port(address(host, port))
            else:
                bound_port = self._server.add_secure_port(address(host, port), grpc_access.credentials(self._tls))
        except RuntimeError:
            check_free(host, port)
            raise ListenError(
                f"cannot listen on {address(host, port)}; grpcio gives no reason, GRPC_VERBOSITY=debug shows it"
            ) from None
        await self._server.start()
        return bound_port

    def stats(self) -> list[MethodStats]:
        """Return nothing: it refuses no call but by `Calls`, which counts it."""
        return []

    async def renew_tls(self) -> None:
        """Do nothing: every new connection asks for the certificate of now."""

    def refuse(self) -> None:
        """Take no more calls, and send clients elsewhere; what is in flight goes on."""
        self._stopping = asyncio.create_task(self._server.stop(_FOREVER_S))

    async def close(self) -> None:
        """After `refuse`: give answers a moment to be sent, and cut off what is left, streams above all."""
        await asyncio.wait({self._stopping}, timeout=_LAST_BYTES_S)
        if not self._stopping.done():
            await self._server.stop(None)
        await self._stopping


def _channel_arguments(limits: ConnectionLimits) -> list[tuple[str, int]]:
    """Return grpcio's words for the limits; a time of 0 is none."""
    times_s = {
        "grpc.max_connection_idle_ms": limits.idle_s,
        "grpc.max_connection_age_ms": limits.age_s,
        "grpc.max_connection_age_grace_ms": AGE_GRACE_S,
        "grpc.keepalive_time_ms": limits.keepalive_s,
        # Not grpc.keepalive_timeout_ms: grpcio 1.81 never starts that timer.
        "grpc.http2.ping_timeout_ms": limits.ping_timeout_s,
        "grpc.server_handshake_timeout_ms": HANDSHAKE_S,
        "grpc.http2.min_recv_ping_interval_without_data_ms": MIN_CLIENT_PING_S,
    }
    return [
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.keepalive_permit_without_calls", 1),
        *((name, math.ceil(1000 * seconds)) for name, seconds in times_s.items() if seconds),
    ]


class _ByPath(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # subscriptable in the stubs only
    """Finds handlers of several services by their path; for a call too many, one that refuses it unread."""

    def __init__(self, handlers: dict[str, Any], calls: Calls) -> None:
        self._handlers = handlers
        self._calls = calls
        self._methods = {f"/{method.service}/{method.name}": method for method in calls.methods if method.read}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler, None if the path is not one of these."""
        path = handler_call_details.method
        method = self._methods.get(path)
        refusal = method and self._calls.refusal(method)
        return grpc_access.refusal(refusal) if refusal else self._handlers.get(path)


def _handler(calls: Calls, method: Method, unpack: _Unpack) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(payload: bytes, context: _Context) -> bytes:
        try:
            message = await unpack(payload) if grpc_wire.is_gzip(payload) else payload
            answer = await calls.answer(method, message, context.time_remaining(), context.invocation_metadata)
        except CallFailedError as failure:
            status = failure.status
            aborted = context.abort(_CODES[status.code], status.message, status.metadata)
        except grpc_wire.WireError as error:
            aborted = context.abort(_CODES[error.code], str(error))
        else:
            context.set_trailing_metadata(answer.metadata)
            return answer.message
        # grpcio keeps what abort() raises, and that keeps this frame: a circle, which lasts until the collector comes
        # by, hundreds of calls later. With their requests in it that is gigabytes.
        payload = message = b""
        del context
        return await aborted

    async def refuse(_unread: object, context: _Context) -> None:
        await handle(b"", context)

    return grpc.unary_unary_rpc_method_handler(handle) if method.read else grpc.stream_stream_rpc_method_handler(refuse)


def _standard(handler: Any, unpack: _Unpack) -> Any:
    """Return the handler of a standard method with its requests unpacked and parsed here, where errors get a status."""

    async def parsed(payload: bytes, context: _Context) -> Any:
        try:
            return standard.parsed(handler, await unpack(payload))
        except grpc_wire.WireError as error:
            aborted = context.abort(_CODES[error.code], str(error))
        del payload, context  # as in `_handler`
        return await aborted

    async def unary_unary(payload: bytes, context: _Context) -> Any:
        request = parsed(payload, context)
        del payload
        try:
            return await handler.unary_unary(await request, context)
        except grpc.aio.AbortError as error:
            raise error.with_traceback(None) from None  # which has the request, again in a circle

    async def unary_stream(payload: bytes, context: _Context) -> AsyncIterator[Any]:
        request = parsed(payload, context)
        del payload
        async for response in handler.unary_stream(await request, context):
            yield response

    async def stream_stream(payloads: AsyncIterator[bytes], context: _Context) -> AsyncIterator[Any]:
        async def requests() -> AsyncIterator[Any]:
            received = cast("AsyncGenerator[bytes, None]", aiter(payloads))
            async with aclosing(received):  # it has the last payload, and is in the circle as well
                async for payload in received:
                    request = parsed(payload, context)
                    del payload
                    yield await request

        async for response in handler.stream_stream(requests(), context):
            yield response

    serialize = {"response_serializer": handler.response_serializer}
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(stream_stream, **serialize)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(unary_stream, **serialize)
    return grpc.unary_unary_rpc_method_handler(unary_unary, **serialize)
