"""grpcio's asyncio server in front of the service: the calls, the standard health service, and reflection."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vaeserve_server import health
from vaeserve_server.addresses import address, check_free
from vaeserve_server.calls import CallFailedError, Calls, Method
from vaeserve_server.errors import ListenError

_Context = grpc.aio.ServicerContext[Any, Any]
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_LAST_BYTES_S = 1.0
# grpcio 1.81 crashes if the grace of one stop() ends while another one completes, so the only grace never ends.
_FOREVER_S = 1e6


class GrpcTransport:
    """One listening port: `start`, `refuse`, `close`, once each."""

    def __init__(
        self, calls: Calls, health_service: health.Health, max_message_bytes: int, *, share_port: bool = False
    ) -> None:
        """Serve `calls`. `share_port` lets other processes listen on the same port, each with its share of clients."""
        self._server = grpc.aio.server(
            options=[
                # Unless it is wanted: or a second server starts on the same port and takes half of the calls.
                ("grpc.so_reuseport", int(share_port)),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),  # the row limit bounds answers
            ]
        )
        for name in calls.services:
            handlers = {method.name: _handler(calls, method) for method in calls.methods if method.service == name}
            self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
        health_pb2_grpc.add_HealthServicer_to_server(health_service, self._server)
        reflection.enable_server_reflection(
            [*calls.services, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port; ListenError if it cannot be had."""
        try:
            bound_port = self._server.add_insecure_port(address(host, port))
        except RuntimeError:
            check_free(host, port)
            raise ListenError(
                f"cannot listen on {address(host, port)}; grpcio gives no reason, GRPC_VERBOSITY=debug shows it"
            ) from None
        await self._server.start()
        return bound_port

    def refuse(self) -> None:
        """Take no more calls, and send clients elsewhere; what is in flight goes on."""
        self._stopping = asyncio.create_task(self._server.stop(_FOREVER_S))

    async def close(self) -> None:
        """After `refuse`: give answers a moment to be sent, and cut off what is left, streams above all."""
        await asyncio.wait({self._stopping}, timeout=_LAST_BYTES_S)
        if not self._stopping.done():
            await self._server.stop(None)
        await self._stopping


def _handler(calls: Calls, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(payload: bytes, context: _Context) -> bytes:
        try:
            answer = await calls.answer(method, payload, context.time_remaining(), context.invocation_metadata)
        except CallFailedError as failure:
            status = failure.status
        else:
            context.set_trailing_metadata(answer.metadata)
            return answer.message
        return await context.abort(_CODES[status.code], status.message, status.metadata)

    async def refuse(_unread: object, context: _Context) -> None:
        await handle(b"", context)

    return grpc.unary_unary_rpc_method_handler(handle) if method.read else grpc.stream_stream_rpc_method_handler(refuse)
