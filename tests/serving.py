"""A real server in this process: the asyncio one, on a port of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaeserve_server.app import Server
from vaeserve_server.settings import Settings

_START_S = 30.0


class RunningServer:
    """What a test may know of a server: its `target` for clients, its `settings`, and the `server` itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.target = ""
        self._started: asyncio.Event | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="server")

    def __enter__(self) -> RunningServer:
        self._thread.start()
        assert self._ready.wait(_START_S), "the server did not start in time"
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self.server = Server(self.settings)
        try:
            await self.server.start()
        except BaseException as error:  # noqa: BLE001 - it is the test's to see
            self._failure = error
            return
        finally:
            if self._failure is not None:
                self._ready.set()
        self.target = f"{self.settings.host}:{self.server.port}"
        self._ready.set()
        await self._stopping.wait()
        await self.server.stop()


@contextlib.contextmanager
def running_server(models_dir: Path, **settings: Any) -> Iterator[RunningServer]:
    """Serve `models_dir` on a free port of 127.0.0.1 with these settings, and drain at the end."""
    chosen = {"port": 0, "device": "cpu", "drain_s": 10.0, **settings}
    with RunningServer(Settings(models=models_dir, **chosen)) as server:
        yield server
