"""Slow lorises: connections that are opened to be held, and send a byte now and then so as not to look idle."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

# HTTP/2's beginning, then a frame of SETTINGS and the head of one that is never sent in full.
_BYTES = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\0\x3f\xff\1\0\0\0\0\1"
_PAUSE_S = 1.0


class Crowd:
    """Connections of which every second one has said nothing yet, and the others all of HTTP/2's beginning."""

    def __init__(self, port: int, count: int) -> None:
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        self._next = [len(_BYTES) - 9 if which % 2 else 0 for which in range(count)]
        for each, sent in zip(self._sockets, self._next, strict=True):
            each.sendall(_BYTES[:sent])
            each.setblocking(False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._dribble, daemon=True)
        self._thread.start()

    def left(self) -> int:
        """Return how many the server has not closed."""
        return sum(map(_is_open, self._sockets))

    def close(self) -> None:
        """Let go of them."""
        self._stop.set()
        self._thread.join()
        for each in self._sockets:
            each.close()

    def _dribble(self) -> None:
        while not self._stop.wait(_PAUSE_S):
            for which, each in enumerate(self._sockets):
                with contextlib.suppress(OSError):  # closed, as it should be
                    each.send(_BYTES[self._next[which] :][:1])
                    self._next[which] += 1


@contextlib.contextmanager
def crowd(port: int, count: int) -> Iterator[Crowd]:
    """Hold `count` such connections."""
    lorises = Crowd(port, count)
    try:
        yield lorises
    finally:
        lorises.close()


def _is_open(connection: socket.socket) -> bool:
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
