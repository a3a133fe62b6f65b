"""Requests that do not come to their end, and what they may hold of calls in hand that are counted from their headers.

Envoy counts a call before its message has come; without a bound in time, callers who send none would take all places.
While there is room nobody is hurried, a slow network least of all. Once three quarters of the places are taken, a
request has a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from vaeserve_server import status
from vaeserve_server.calls import Calls, Method

_READ_S = 1.0


class Upload(Protocol):
    """A call whose request is being read."""

    def end(self, verdict: status.Status) -> None:
        """Stop reading, and answer `verdict`."""


class Unfinished:
    """The requests that are being read, of those `in_hand`, which returns how many calls have a place."""

    def __init__(self, calls: Calls, in_hand: Callable[[], int]) -> None:
        self._calls = calls
        self._in_hand = in_hand
        self._crowd = -(-3 * calls.max_calls // 4)
        self._uploads: dict[Upload, tuple[float, Method]] = {}  # the oldest first
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, upload: Upload, method: Method) -> None:
        """Note that a request is being read from now on. Call on the event loop, as the others."""
        self._uploads[upload] = (asyncio.get_running_loop().time(), method)
        if self._timer is None and self._in_hand() >= self._crowd:
            self._look()

    def done(self, upload: Upload) -> None:
        """Forget it."""
        self._uploads.pop(upload, None)

    def _look(self) -> None:
        """End what is too old, while there are many, and look again later: nobody tells of calls that Envoy refuses."""
        self._timer = None
        in_hand = self._in_hand()
        if in_hand < self._crowd:
            return
        loop = asyncio.get_running_loop()
        latest = loop.time() - _READ_S
        old = [upload for upload, (began, _) in self._uploads.items() if began <= latest]
        for upload in old:
            _, method = self._uploads.pop(upload)
            upload.end(self._calls.unfinished(method, in_hand))
        self._timer = loop.call_later(_READ_S, self._look)
