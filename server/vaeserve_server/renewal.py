"""Files that others renew while the server runs, certificates and tokens: noticed, and read again when they are whole.

They are looked at once a second. Watching the file system's events instead would miss what Kubernetes and network file
systems do (a link that points elsewhere, a change on another machine), and a second is soon enough.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from vaeserve_server.errors import StartError

POLL_S = 1.0

_log = logging.getLogger(__name__)
_Look = tuple[tuple[int, ...], ...]


class Renewal:
    """Calls `read_again` when `files` have changed and then rested for a look: a pair that is half replaced is not."""

    def __init__(self, what: str, files: Sequence[Path], read_again: Callable[[], Awaitable[None]]) -> None:
        """Note how the files are now; read them after this. `what` is their name in the log."""
        self._what = what
        self._files = list(files)
        self._read_again = read_again
        self._read = self._look()

    async def watch(self) -> None:
        """Watch for ever. Files that cannot be used are named in the log, once, and what was read before stays."""
        seen = self._read
        while True:
            await asyncio.sleep(POLL_S)
            previous, seen = seen, await asyncio.to_thread(self._look)
            if seen == self._read or seen != previous:
                continue
            self._read = seen
            try:
                await self._read_again()
            except StartError as error:
                _log.error("%s changed and cannot be used, keeping the old: %s", self._what, error)
            except Exception:  # noqa: BLE001 - one bad renewal must not end the watch for the next
                _log.exception("%s changed and cannot be used, keeping the old", self._what)
            else:
                _log.info("%s changed and is in use", self._what)

    def _look(self) -> _Look:
        return tuple(_stat(file) for file in self._files)


def _stat(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError as error:
        return (-(error.errno or 1),)
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
