"""`vaeserve-server` as a process of its own, on the transport that pytest was told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import serving

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("VAESERVE_", "GRPC_"))}
ENVIRONMENT |= {
    "VAESERVE_TRANSPORT": serving.default_transport,
    "VAESERVE_METRICS_PORT": "0",
    "VAESERVE_WATCHDOG_S": str(serving.PATIENT_WATCHDOG_S),
}
COMMAND = [sys.executable, "-m", "vaeserve_server"]


class Process:
    """A server process that said it is ready."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen
        assert popen.stdout is not None
        self.ready_line = popen.stdout.readline().rstrip("\n")
        assert self.ready_line, f"the server did not start: {popen.communicate()[1]}"
        self.target = self.ready_line.split(" on ")[1].split(" ")[0]

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Wait for the exit; return its status and what was logged."""
        _, log = self.popen.communicate(timeout=30)
        return self.popen.returncode, log


@contextlib.contextmanager
def server_process(models: Path, *flags: str, port: int = 0) -> Iterator[Process]:
    """Start a server with these flags, and kill it at the end if it has not ended."""
    command = [*COMMAND, "--models", str(models), "--port", str(port), "--device", "cpu", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as popen:
        try:
            yield Process(popen)
        finally:
            popen.kill()
