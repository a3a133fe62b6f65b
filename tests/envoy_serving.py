"""A real server behind Envoy, in a process of its own, with a probe for what a test must wait for inside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings

PROBE = "/tests.Probe/Look"
_LIMIT_S = 60.0
_PROGRAM = """
import sys
from vaeserve_server import envoy
from vaeserve_server.__main__ import main
envoy.APPLICATION = "envoy_probe:app"
sys.exit(main())
"""


class EnvoyServer:
    """What a test may know of a server behind Envoy; the same as of one in this process."""

    def __init__(self, settings: Settings) -> None:
        """Start it; StartError with what it said if it does not come to serve."""
        self.settings = settings
        variables = {f"VAESERVE_{name.upper()}": str(value) for name, value in settings.model_dump().items()}
        environment = {
            **os.environ,
            **variables,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout is not None
        ready_line = self._process.stdout.readline()
        if not ready_line:
            self.wait()
            said = self.log()
            self._log.close()
            raise StartError(said.strip().rpartition("cannot start: ")[2])
        self.target = ready_line.split(" on ")[1].split(" ")[0]
        self.server = SimpleNamespace(port=int(self.target.rpartition(":")[2]))
        self._channel = grpc.insecure_channel(self.target)
        self._look = self._channel.unary_unary(PROBE)

    @property
    def pid(self) -> int:
        """The process that is both Envoy and Python."""
        return self._process.pid

    def log(self) -> str:
        """Return what the process wrote to standard error so far."""
        self._log.seek(0)
        return self._log.read()

    def stop(self) -> None:
        """Drain it, and see that it ended well."""
        self._channel.close()
        self._process.send_signal(signal.SIGTERM)
        status = self.wait()
        said = self.log()
        self._log.close()
        assert status == 0, said
        assert "Traceback" not in said, said
        assert "panicked" not in said, said

    def wait(self) -> int:
        """Wait for the end; return the exit status."""
        with self._process:
            return self._process.wait(_LIMIT_S)

    def until(self, condition: Callable[[Any], bool]) -> None:
        """Wait until `condition` holds of the server as far as the probe shows it."""
        deadline = time.monotonic() + _LIMIT_S
        while not condition(self._view()):
            assert time.monotonic() < deadline, "the server did not come to the state that the test waits for"

    def _view(self) -> Any:
        state = json.loads(self._look(b"", timeout=_LIMIT_S))
        engines = [SimpleNamespace(queued_rows=lambda rows=rows: rows) for rows in state["queued_rows"]]
        pool = SimpleNamespace(threads=state["threads"], _free=state["free_threads"])
        return SimpleNamespace(repository=SimpleNamespace(engines=engines), _pool=pool)
