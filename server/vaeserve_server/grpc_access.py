"""What grpcio's server asks of those who connect: certificates when they do, tokens before each call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from vaeserve_server.calls import CallFailedError, Calls
from vaeserve_server.status import Status
from vaeserve_server.tls import Material, Tls

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # only the stubs' class is generic
    """Asks of every call whether its caller may make it, before its message is read."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Return what handles the call: what refuses it, if it is not let in."""
        try:
            self._calls.admit(details.method, lambda: details.invocation_metadata)
        except CallFailedError as failure:
            return refusal(failure.status)
        return await continuation(details)


def refusal(status: Status) -> grpc.RpcMethodHandler[bytes, bytes]:
    """Return what ends a call with a status before its message is read.

    It is a handler of streams: one of a single message would have it read in whole first.
    """

    async def refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        context.set_code(_CODES[status.code])  # abort() does the same by an exception, and costs a fifth more
        context.set_details(status.message)
        context.set_trailing_metadata(status.metadata)

    return grpc.stream_stream_rpc_method_handler(refuse)


def credentials(tls: Tls) -> grpc.ServerCredentials:
    """Return what shows each new connection the certificate of now."""
    shown = tls.material

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        if shown is tls.material:
            return None
        shown = tls.material
        return _configuration(shown)

    asks_certificates = tls.files.client_ca is not None
    return grpc.dynamic_ssl_server_credentials(_configuration(shown), renewed, asks_certificates)  # type: ignore[arg-type]  # the stubs lack its None


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.private_key, material.certificate_chain)], root_certificates=material.client_ca
    )
