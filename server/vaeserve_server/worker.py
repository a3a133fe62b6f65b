"""One of several server processes on one port, as `supervisor` starts it.

Settings come as one line of JSON on standard input. The first line on standard output is the ready line, or starts with
FAILED and says why there is none; the second is the address of the worker's own metrics, empty where there are none.
When standard input ends the supervisor is gone, and the worker drains and ends too.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

from vaeserve_server import app, interpreter, logs
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings

FAILED = "cannot start: "


def main() -> int:
    """Serve until a signal or the supervisor's end; return 0 after a drain, 1 if the worker cannot start."""
    settings = Settings.model_validate_json(_first_line(sys.stdin.fileno()))
    logs.configure(settings.log_format, settings.log_level)
    try:
        interpreter.run(_serve(settings))
    except StartError as error:
        sys.stdout.write(f"{FAILED}{error}\n")
        return 1
    return 0


class _Worker(app.Server):
    def ready_line(self) -> str:
        """Return what is served where, and on a second line where the metrics are."""
        return f"{super().ready_line()}\n{self.metrics_url}"


async def _serve(settings: Settings) -> None:
    await app.serve(_Worker(settings), _watch)


def _watch(on_stop: Callable[[], None], on_reload: Callable[[], None]) -> None:
    app.watch_signals(on_stop, on_reload)
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(sys.stdin.fileno())
        on_stop()

    loop.add_reader(sys.stdin.fileno(), end)  # nothing more is ever said there, so this is its end


def _first_line(descriptor: int) -> bytes:
    """Read no further than the line, so that the end of the stream is still to be seen."""
    line = b""
    while not line.endswith(b"\n") and (more := os.read(descriptor, 1)):
        line += more
    return line


if __name__ == "__main__":
    sys.exit(main())
