"""A real server on a port of its own: in this process, in a loop that all such servers share, or behind Envoy.

One loop for all, because grpcio's asyncio side is one per process and complains of a loop that was closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from envoy_serving import EnvoyServer
from vaeserve_server.app import Server
from vaeserve_server.settings import Settings, Transport

default_transport: Transport = "grpc"
"""Set once, before any test, by pytest's option --transport."""

_T = TypeVar("_T")
_LIMIT_S = 60.0
# What a test lets take its time takes it in processor time, which may be long in coming on a busy machine.
PATIENT_WATCHDOG_S = 600.0


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="servers", daemon=True).start()
    return loop


def _in_loop(coroutine: Coroutine[Any, Any, _T]) -> _T:
    return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, _LIMIT_S), _loop()).result()


class RunningServer:
    """What a test may know of a server: its `target` for clients, its `settings`, and the `server` itself."""

    def __init__(self, settings: Settings) -> None:
        """Start it; what `Server.start` raises is raised here."""
        self.settings = settings
        self.server = _in_loop(self._start())
        self.target = f"{settings.host}:{self.server.port}"

    def stop(self) -> None:
        """Drain it."""
        _in_loop(self.server.stop())

    def until(self, condition: Callable[[Server], bool]) -> None:
        """Wait until `condition` of the server holds, looked at between any two turns of its loop."""

        async def look() -> None:
            while not condition(self.server):  # noqa: ASYNC110 - there is no event for all that a test may ask
                await asyncio.sleep(0)

        _in_loop(look())

    async def _start(self) -> Server:
        server = Server(self.settings)
        await server.start()
        return server


def queued_rows(server: Server) -> int:
    """Return the rows that wait in all queues of a started server."""
    assert server.models.repository is not None
    return sum(engine.queued_rows() for engine in server.models.repository.engines)


def tasks(server: Any) -> int:
    """Return the tasks on the loop of a started server."""
    return len(asyncio.all_tasks()) if isinstance(server, Server) else server.tasks


@contextlib.contextmanager
def running_server(models_dir: Path, **settings: Any) -> Iterator[RunningServer]:
    """Serve `models_dir` on a free port of 127.0.0.1 with these settings, and drain at the end.

    The transport is the one that pytest was told by --transport, unless the settings name one.
    """
    chosen = Settings(
        models=models_dir,
        **{
            "port": 0,
            "device": "cpu",
            "metrics_port": 0,
            "drain_s": 10.0,
            "watchdog_s": PATIENT_WATCHDOG_S,
            "transport": default_transport,
            **settings,
        },
    )
    server: Any = EnvoyServer(chosen) if chosen.transport == "envoy" else RunningServer(chosen)
    try:
        yield server
    finally:
        server.stop()
