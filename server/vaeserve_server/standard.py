"""Health and reflection, the services that every gRPC tool asks for, as grpcio's handlers for any transport."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from vaeserve_server import health
from vaeserve_server.grpc_wire import WireError


def handlers(health_service: health.Health, services: Iterable[str]) -> dict[str, Any]:
    """Return the handlers by path, /service/method; reflection lists `services` beside themselves."""
    registered = _Handlers()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, registered)
    names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflector = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]  # the stubs lack it
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflector, registered)
    return registered.by_path


def parsed(handler: Any, payload: bytes) -> Message:
    """Return the request of a handler; WireError if the bytes are none."""
    try:
        message: Message = handler.request_deserializer(payload)
    except DecodeError:
        raise WireError(code_pb2.INVALID_ARGUMENT, f"the request's {len(payload)} bytes are no such message") from None
    return message


class _Handlers:
    """Stands in for a server where the generated code registers a service's methods."""

    def __init__(self) -> None:
        self.by_path: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any) -> None:
        """Take nothing: the registered handlers are the same ones, by name."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: dict[str, Any]) -> None:
        """Take the handlers of one service."""
        self.by_path |= {f"/{service_name}/{name}": handler for name, handler in method_handlers.items()}
