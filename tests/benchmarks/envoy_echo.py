"""A bare echo inside Envoy: the server as it is, but calls of its verbs get recorded answers, and nothing is computed.

What a front end in Envoy costs at least, with the limits and logs of the real one; the bytes on the wire are the same.
Run as a program it is the server's command with this application in it: envoy_echo.py ANSWERS FLAG ...
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from traffic import SERVICE, framed

_ANSWERS_VARIABLE = "BENCH_ANSWERS"
_HEADERS = [(b"content-type", b"application/grpc")]
_START = {"type": "http.response.start", "status": 200, "headers": _HEADERS, "trailers": True}
_OK = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}

_Event = dict[str, Any]


def application() -> Callable[..., Awaitable[None]]:
    """Return the ASGI application, with the answers of the file that the environment names."""
    from vaeserve_server.envoy_main import app as served

    recorded = json.loads(Path(os.environ[_ANSWERS_VARIABLE]).read_text())
    bodies = {
        f"/{SERVICE}/{method}": {"type": "http.response.body", "body": framed(base64.b64decode(answer))}
        for method, answer in recorded.items()
    }

    async def echo(
        scope: _Event, receive: Callable[[], Awaitable[_Event]], send: Callable[[_Event], Awaitable[None]]
    ) -> None:
        body = bodies.get(scope.get("path", ""))
        if body is None:
            await served(scope, receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        await send(_START)
        await send(body)
        await send(_OK)

    return echo


def main() -> int:
    """Become the server behind Envoy, with the echo in it."""
    from vaeserve_server import envoy
    from vaeserve_server.__main__ import main as serve

    answers, *flags = sys.argv[1:]
    os.environ[_ANSWERS_VARIABLE] = answers
    envoy.APPLICATION = "envoy_echo:app"
    sys.argv[1:] = flags
    return serve()


if __name__ == "__main__":
    sys.exit(main())
else:  # imported by pyvoy
    app = application()
