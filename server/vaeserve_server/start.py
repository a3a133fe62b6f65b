"""Which life the settings ask for: one process, several under a supervisor, or one behind Envoy."""

from __future__ import annotations

import logging
import signal

from vaeserve_server import app, connections, interpreter, logs
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings

_log = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts the drain short. Return the exit status."""
    logs.configure(settings.log_format, settings.log_level)
    connections.raise_file_limit()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload; by default it would end us
    try:
        if settings.transport == "envoy":
            from vaeserve_server import envoy  # noqa: PLC0415 - needs an extra

            envoy.execute(settings)
        if settings.workers > 1:
            from vaeserve_server import supervisor  # noqa: PLC0415 - only several workers need it

            return supervisor.run(settings)
        interpreter.run(_alone(settings))
    except StartError as error:
        _log.error("cannot start: %s", error)
        return 1
    return 0


async def _alone(settings: Settings) -> None:
    await app.serve(app.Server(settings), app.watch_signals)
