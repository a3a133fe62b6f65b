"""How much of the server its callers may hold without using it: connections, streams and time, for every transport.

A connection that is opened and then says nothing, or a byte now and then, costs little but a descriptor and some
memory; so their number is bounded, and the time in which each must come to a call.
"""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass

from vaeserve_server.settings import Settings

MAX_STREAMS = 256
"""Calls under way on one connection; more wait at the caller's side, as HTTP/2 has it."""
HANDSHAKE_S = 20.0
"""Time for a connection's beginning: TLS, and HTTP/2's preface and settings."""
AGE_GRACE_S = 60.0
"""Time for the calls of a connection that has reached its age."""
MIN_CLIENT_PING_S = 10.0
"""Clients' own pings may come this often; one that sends more is sent away."""

# A peer that does not take what is sent to it does not answer a ping either.
_MOST_PING_TIMEOUT_S = 20.0
_MOST = 16384
_RESERVED_FILES = 128


@dataclass(frozen=True)
class ConnectionLimits:
    """The bounds of one server process. Times are in seconds; 0 is none."""

    connections: int
    idle_s: float
    age_s: float
    keepalive_s: float

    @property
    def ping_timeout_s(self) -> float:
        """The time for the answer to a ping."""
        return min(self.keepalive_s, _MOST_PING_TIMEOUT_S)


def limits_of(settings: Settings) -> ConnectionLimits:
    """Return the bounds that the settings ask for, as far as the limit of open files allows."""
    return ConnectionLimits(
        connections=settings.max_connections or _affordable(),
        idle_s=settings.idle_s,
        age_s=settings.connection_age_s,
        keepalive_s=settings.keepalive_s,
    )


def raise_file_limit() -> None:
    """Let this process, and what it becomes or starts, open as many files as the system allows it, up to what we use.

    The soft limit is 1024 on many systems, for the sake of programs that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST + _RESERVED_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # what cannot be raised is what there is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _affordable() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else max(1, min(_MOST, files - _RESERVED_FILES))
