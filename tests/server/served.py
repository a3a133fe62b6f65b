"""A server in a process of its own, on either transport, watched from outside: memory, life, what it logged."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import grpc

import child_log

_LIMIT_S = 60.0


def has_envoy() -> bool:
    """Return whether the transport envoy can be had here."""
    return importlib.util.find_spec("pyvoy") is not None


class Served:
    """A context in which `models` is served at `target` by the process `pid`; leaving it sees that it ends well."""

    def __init__(
        self, models: Path, transport: str, *, variables: Mapping[str, str] | None = None, **settings: object
    ) -> None:
        chosen = {"models": models, "transport": transport, "port": 0, "device": "cpu", "metrics": False, **settings}
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("VAESERVE_", "GRPC_"))}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vaeserve_server"],
            env=environment
            | dict(variables or {})
            | {f"VAESERVE_{name.upper()}": str(value) for name, value in chosen.items()},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        ready_line = self._process.stdout.readline()
        assert ready_line, self.log()
        self.pid = self._process.pid
        self.target = ready_line.split(" on ")[1].split(" ")[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._process:
            self._process.send_signal(signal.SIGTERM)
            try:
                status = self._process.wait(_LIMIT_S)
            finally:
                self._process.kill()
        if kind is None:
            assert status == 0, self.log()
        self._log.close()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """Return what the process wrote to standard error so far."""
        return child_log.read(self._log)

    def resident_mib(self) -> float:
        """Return the memory that the process holds now."""
        return self._status("VmRSS")

    def peak_mib(self) -> float:
        """Return the most memory that it ever held."""
        return self._status("VmHWM")

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.target)

    def _status(self, field: str) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        (kib,) = (int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
        return kib / 1024
