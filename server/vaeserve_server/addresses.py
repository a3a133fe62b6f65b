"""Addresses as every transport writes them, and whether they can be listened on."""

from __future__ import annotations

import socket

from vaeserve_server.errors import ListenError


def address(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 address."""
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


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
