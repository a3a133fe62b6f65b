"""grpc.health.v1: whether to send calls here: for the whole server (""), for each service, and for each model.

The servicer of grpcio-health-checking forgets its other watchers when one leaves, and its Watch never ends, so that a
drain would last until its limit; hence this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vaeserve_server.errors import shown

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the generated base has no types
    """The standard health service: NOT_SERVING until `set_serving(True)`."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = ["", *services]
        self._models: Mapping[str, bool] = {}
        self._serving = False
        self._closed = False
        self._changed = asyncio.Event()

    def is_serving(self, service: str) -> bool:
        """Return whether to send calls to a service or model here: False for one that is not here."""
        if service in self._services:
            return self._serving and any(self._models.values())
        return self._serving and self._models.get(service, False)

    def set_serving(self, serving: bool) -> None:
        """Tell everybody who asks or watches."""
        self._serving = serving
        self._notify()

    def set_models(self, models: Mapping[str, bool]) -> None:
        """Tell whether each model can answer, by the names under which it may be asked for."""
        self._models = models
        self._notify()

    def close(self) -> None:
        """NOT_SERVING, for good: every Watch says so and ends."""
        self._serving = False
        self._closed = True
        self._notify()

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        """Return the state of one service; NOT_FOUND if there is no such service."""
        if request.service not in self._services and request.service not in self._models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {shown(request.service)}")
        return self._response(request.service)

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:  # noqa: N802
        """Yield the state of one service now and whenever it changes."""
        previous = None
        while True:
            changed = self._changed
            response = self._response(request.service)
            if response != previous:
                yield response
            previous = response
            if self._closed:
                return
            await changed.wait()

    def _response(self, service: str) -> Any:
        if service not in self._services and service not in self._models:
            return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if self.is_serving(service) else _Response.NOT_SERVING)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
