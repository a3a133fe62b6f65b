"""The server as it runs inside Envoy, and beside its methods one that tells a test what no client could see."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from envoy_serving import PROBE
from vaeserve_server.app import Server
from vaeserve_server.envoy_main import app as served
from vaeserve_server.transport_envoy import Stream

HOLD_VARIABLE = "TESTS_HOLD_LOADING"
if HOLD_VARIABLE in os.environ:  # a file; the server loads its models once it is there
    held = Server._load

    async def load_later(server: Server) -> None:
        while not Path(os.environ[HOLD_VARIABLE]).exists():  # noqa: ASYNC110, ASYNC240 - another process makes it
            await asyncio.sleep(0.01)
        await held(server)

    Server._load = load_later  # type: ignore[method-assign]


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope.get("path") != PROBE:
        await served(scope, receive, send)
        return
    repository, pool = served.server.models.repository, served.server.models.pool
    assert repository is not None
    assert pool is not None
    state = {
        "queued_rows": [engine.queued_rows() for engine in repository.engines],
        "threads": pool.threads,
        "free_threads": pool._free,
        "streams": len(served._transport._streams),
        "tasks": len(asyncio.all_tasks()),
        "calls": served.server._calls._in_flight,
    }
    Stream(receive, send, max_message_bytes=0).reply(json.dumps(state).encode())
