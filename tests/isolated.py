"""Runs commands in a network namespace that has nothing but loopback, and tells what they tried to reach beyond it.

Runs itself under `unshare --net`, with the command as JSON on standard input. Nobody can reach anything in there, but
the kernel counts who tries: packets and connections without a route, and queries to a name server that we play
ourselves where the machine's is on loopback. A packet filter or a tracer would say more, where there is one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
LIMIT_S = 600


def available() -> list[str] | None:
    """Return the command that makes such a namespace, None where this machine permits none."""
    unshare = shutil.which("unshare")
    for flags in (["--net"], ["--net", "--map-root-user"]):
        if unshare and subprocess.run([unshare, *flags, "true"], capture_output=True, check=False).returncode == 0:
            return [unshare, *flags]
    return None


def attempts(commands: dict[str, list[str]], **variables: str) -> dict[str, dict[str, Any]]:
    """Run each command in a namespace of its own; return its `status`, `said`, and what it `tried` by name."""
    unshare = available()
    assert unshare is not None
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    told = {}
    for name, command in commands.items():
        done = subprocess.run(
            [*unshare, sys.executable, __file__],
            input=json.dumps(command),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env=environment | variables,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told[name] = json.loads(done.stdout)
    return told


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))


def _name_servers() -> list[socket.socket]:
    """Listen where the machine's name servers are, if that is on loopback; elsewhere the kernel counts."""
    sockets = []
    resolver = Path("/etc/resolv.conf")
    text = resolver.read_text() if resolver.exists() else ""
    for address in {*re.findall(r"^nameserver\s+(127[\d.]+)", text, re.MULTILINE), "127.0.0.1"}:
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind((address, 53))
        listener.setblocking(False)
        sockets.append(listener)
    return sockets


def _counted() -> dict[str, int]:
    """Return what the kernel counted in this namespace of what leads nowhere."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines()]
    ipv4: dict[str, str] = {}
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        ipv4 |= {f"{names[0]}{name}": value for name, value in zip(names[1:], values[1:], strict=True)}
    ipv6_file = Path("/proc/net/snmp6")
    ipv6 = dict(line.split() for line in ipv6_file.read_text().splitlines()) if ipv6_file.exists() else {}
    return {
        "without a route": int(ipv4["Ip:OutNoRoutes"]) + int(ipv6.get("Ip6OutNoRoutes", 0)),
        "connections that failed": int(ipv4["Tcp:AttemptFails"]),
    }


def _queries(listeners: list[socket.socket]) -> int:
    count = 0
    for listener in listeners:
        try:
            while listener.recv(4096):
                count += 1
        except BlockingIOError:
            continue
    return count


def main() -> None:
    command = json.loads(sys.stdin.read())
    _raise_loopback()
    listeners = _name_servers()
    before = _counted()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    tried = {name: count - before[name] for name, count in _counted().items()}
    tried["names looked up"] = _queries(listeners)
    json.dump({"status": done.returncode, "said": done.stdout[-4000:], "tried": tried}, sys.stdout)


if __name__ == "__main__":
    main()
