"""Addresses as every transport writes them, and whether they can be listened on."""

from __future__ import annotations

import contextlib
import errno
import socket

from vaeserve_server.errors import ListenError

_NUMERIC = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}  # a name often has an IPv6 address where the machine has none


def address(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 address."""
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


def reserve(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address for listeners with SO_REUSEPORT, and takes no connections itself.

    `port` 0 takes a free one. ListenError with the reason if the address cannot be listened on.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ListenError("this system cannot share a port among processes (SO_REUSEPORT); use --workers 1")
    check_free(host, port)
    family, kind, protocol, _, bound = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    held = socket.socket(family, kind, protocol)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        held.bind(bound)
    except OSError:  # connections of a server that ended are still fading; they hold nobody up who says so
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(bound)
    return held


def check_free(host: str, port: int) -> None:
    """Raise ListenError with the reason if the address cannot be listened on."""
    try:
        family, kind, protocol, _, bound = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(bound)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None


def endpoints(host: str, port: int) -> list[tuple[str, int]]:
    """Return every numeric address of `host`, which may be a name, with the port to listen on there.

    Port 0 stays what it is for one address, for several it becomes a free port of them all. Addresses that this machine
    does not have are left out; ListenError with the reason if none is left, or one is taken.
    """
    found: list[tuple[str, int]] = []
    reason = None
    with contextlib.ExitStack() as probes:
        try:
            infos = dict.fromkeys(socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM))
            for family, kind, protocol, _, bound in infos:
                try:
                    probe = probes.enter_context(socket.socket(family, kind, protocol))
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((bound[0], port, *bound[2:]))
                except OSError as error:
                    if error.errno not in _NOT_HERE:
                        raise
                    reason = error
                else:
                    port = port or (probe.getsockname()[1] if len(infos) > 1 else 0)
                    found.append((socket.getnameinfo(bound, _NUMERIC)[0], port))
        except OSError as error:
            raise _cannot_listen(host, port, error) from None
    if not found:
        raise _cannot_listen(host, port, reason or OSError("it is no address"))
    return found


def _cannot_listen(host: str, port: int, error: OSError) -> ListenError:
    reason = error.strerror or error
    return ListenError(f"cannot listen on {address(host, port)}: {reason}; choose another --host or --port")
