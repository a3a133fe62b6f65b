"""Looking at the models folder for as long as the server lives, in a thread of its own, beside the calls.

The thread loads; what is served changes in one step on the event loop, between two calls. Calls that are in flight end
on the engine that they began on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from threading import Event, Thread

from vaeserve_server import memory
from vaeserve_server.errors import StartError
from vaeserve_server.loader import Loader
from vaeserve_server.repository import Repository

_log = logging.getLogger(__name__)
# A load that is on when the server ends may end too, if it does so soon: threads of a run pool may wait for it.
_PATIENCE_S = 5.0


class Reloader:
    """Watches from `start` to `close`. `serve` is called on the event loop with what is to be served from then on.

    `results` counts: `ok` reloads that changed what is served, `failed` versions that were refused and looks that
    could not be had.
    """

    def __init__(self, loader: Loader, interval_s: float, serve: Callable[[Repository], None]) -> None:
        """Look every `interval_s`; 0 looks only when asked to."""
        self.results = {"ok": 0, "failed": 0}
        self._loader = loader
        self._interval_s = interval_s or None
        self._serve = serve
        self._loop = asyncio.get_running_loop()
        self._wake = Event()
        self._asked = False
        self._untidy = False
        self._closed = False
        self._trouble = ""
        self._thread = Thread(target=self._live, name="reload", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def ask(self) -> None:
        """Have the folder looked at now, and what was refused or does not serve tried again."""
        self._asked = True
        self._wake.set()

    def tidy(self) -> None:
        """Have what an unloaded model took given back to the system."""
        self._untidy = True
        self._wake.set()

    async def close(self) -> None:
        """Change nothing from now on, and wait a moment for a load that is under way."""
        self._closed = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _PATIENCE_S)

    def _live(self) -> None:
        while True:
            woken = self._wake.wait(self._interval_s)
            self._wake.clear()
            if self._closed:
                return
            if self._untidy:
                self._untidy = False
                memory.give_back()
            asked, self._asked = self._asked, False
            if asked or not woken:
                self._look(asked=asked)

    def _look(self, *, asked: bool) -> None:
        refusals = self._loader.refusals
        try:
            repository = self._loader.next(again=asked)
        except StartError as error:
            self._fail(str(error), asked=asked)
            return
        except Exception as error:  # noqa: BLE001 - the watch must go on whatever one look met
            _log.exception("looking at the models failed")
            self._fail(repr(error), asked=asked)
            return
        self._trouble = ""
        self.results["failed"] += self._loader.refusals - refusals
        if repository is not None:
            self.results["ok"] += 1
            self._loop.call_soon_threadsafe(self._swap, repository)
        elif asked:
            _log.info("models looked at, none of them changed")

    def _fail(self, trouble: str, *, asked: bool) -> None:
        """Tell of a look that could not be had, once for as long as it stays so."""
        if asked or trouble != self._trouble:
            self.results["failed"] += 1
            _log.error("models cannot be looked at; serving on", extra={"fields": {"reason": trouble}})
        self._trouble = trouble

    def _swap(self, repository: Repository) -> None:
        if not self._closed:
            self._serve(repository)
            _log.info("models reloaded", extra={"fields": {"serving": ", ".join(e.label for e in repository.engines)}})
