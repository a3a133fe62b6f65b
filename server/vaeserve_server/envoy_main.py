"""What runs inside Envoy: pyvoy imports `app` from here, calls it once for Envoy's life and once for every stream."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

from vaeserve_server import app as life
from vaeserve_server import envoy, interpreter, logs
from vaeserve_server.calls import Calls
from vaeserve_server.credentials import tls_files
from vaeserve_server.envoy_admin import Admin
from vaeserve_server.errors import StartError
from vaeserve_server.health import Health
from vaeserve_server.settings import Settings
from vaeserve_server.transport_envoy import EnvoyTransport, quiet_loop_errors

_log = logging.getLogger(__name__)


class Application:
    """The server as an ASGI application, with the handover of the process that became Envoy."""

    def __init__(self, folder: Path, ended_fd: int, settings: Settings) -> None:
        self._folder = folder
        self._ended_fd = ended_fd
        self._settings = settings
        self._admin = Admin(folder, tls_files(settings))
        self.server: life.Server
        self._transport: EnvoyTransport

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer one stream, or live Envoy's life."""
        if scope["type"] != "lifespan":
            await self._transport(scope, receive, send)
            return
        await receive()
        asyncio.get_running_loop().set_exception_handler(quiet_loop_errors)
        try:
            self.server = life.Server(self._settings, self._new_transport)
        except StartError as error:
            _log.error("cannot start: %s", error)
            self._end(1)
        serving = asyncio.create_task(self._serve())
        await send({"type": "lifespan.startup.complete"})  # only then does Envoy listen
        await receive()
        serving.cancel()  # done already, unless Envoy ends by itself
        await asyncio.wait({serving})
        shutil.rmtree(self._folder, ignore_errors=True)
        await send({"type": "lifespan.shutdown.complete"})

    def _new_transport(self, calls: Calls, health: Health, max_message_bytes: int) -> EnvoyTransport:
        self._transport = EnvoyTransport(calls, health, max_message_bytes, self._admin)
        self._transport.watch_ended(self._ended_fd)
        return self._transport

    async def _serve(self) -> None:
        """Serve from start to drain, then end Envoy; its exit status is 0, so what goes wrong ends the process here."""
        try:
            await life.serve(self.server, _watch_signals)
        except StartError as error:
            _log.error("cannot start: %s", error)
        except Exception:  # noqa: BLE001 - the process ends with it
            _log.exception("the server failed")
        else:
            if not await self._admin.quit():
                self._end(0)
            return
        self._end(1)

    def _end(self, exit_status: int) -> NoReturn:
        """End the process, without Envoy's leave."""
        shutil.rmtree(self._folder, ignore_errors=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_status)


def _watch_signals(on_stop: Callable[[], None], on_reload: Callable[[], None]) -> None:
    """Call back at SIGTERM, SIGINT and SIGHUP. They are blocked in every thread, so that one can wait for them."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        while True:
            stops = signal.sigwait(envoy.SIGNALS) in envoy.STOP_SIGNALS
            loop.call_soon_threadsafe(on_stop if stops else on_reload)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _application() -> Application:
    handover = json.loads(os.environ.pop(envoy.HANDOVER_VARIABLE))
    settings = Settings.model_validate(handover["settings"])
    sys.executable = handover["python"]  # what is embedded guesses
    logs.configure(settings.log_format, settings.log_level)
    interpreter.tune()
    return Application(Path(handover["folder"]), handover["ended_fd"], settings)


app = _application()
