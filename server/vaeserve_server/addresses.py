"""Addresses as every transport writes them, and whether they can be listened on."""

from __future__ import annotations

import socket

from vaeserve_server.errors import ListenError


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
        raise ListenError(
            f"cannot listen on {address(host, port)}: {error.strerror or error}; choose another --host or --port"
        ) from None
