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
from typing import IO, Any

import grpc

import child_log
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings

PROBE = "/grpc.tests.Probe/Look"  # among the services that are answered however many calls are in hand
_LIMIT_S = 60.0
_PROGRAM = """
import sys
from vaeserve_server import envoy
from vaeserve_server.__main__ import main
envoy.APPLICATION = "envoy_probe:app"
sys.exit(main())
"""


def spawn(settings: Settings, log: IO[str], **variables: str) -> subprocess.Popen[str]:
    """Start a server with the probe; what it logs goes to `log`."""
    variables |= {
        f"VAESERVE_{name.upper()}": str(value) for name, value in settings.model_dump(exclude_none=True).items()
    }
    variables["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", _PROGRAM]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=log, text=True)


class EnvoyServer:
    """What a test may know of a server behind Envoy; the same as of one in this process."""

    def __init__(self, settings: Settings, **variables: str) -> None:
        """Start it, with these environment variables; StartError with what it said if it does not come to serve."""
        self.settings = settings
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = spawn(settings, self._log, **variables)
        assert self.process.stdout is not None
        ready_line = self.process.stdout.readline()
        if not ready_line:
            raise StartError(self.end(1).strip().rpartition("cannot start: ")[2])
        self.target = ready_line.split(" on ")[1].split(" ")[0]
        self.server = SimpleNamespace(port=int(self.target.rpartition(":")[2]))

    def log(self) -> str:
        """Return what the process wrote to standard error so far."""
        return child_log.read(self._log)

    def stop(self) -> None:
        """Drain it, and see that it ended well."""
        self.process.send_signal(signal.SIGTERM)
        said = self.end(0)
        assert "panicked" not in said, said

    def end(self, expected_status: int) -> str:
        """Wait for the end, check how it ended, and return the log."""
        with self.process:
            try:
                status = self.process.wait(_LIMIT_S)
            finally:
                self.process.kill()  # or leaving would wait for ever for one that does not end
        said = self.log()
        self._log.close()
        assert status == expected_status, said
        return said

    def until(self, condition: Callable[[Any], bool]) -> None:
        """Wait until `condition` holds of the server as far as the probe shows it."""
        deadline = time.monotonic() + _LIMIT_S
        with grpc.insecure_channel(self.target) as channel:
            while not condition(_view(channel)):
                assert time.monotonic() < deadline, "the server did not come to the state that the test waits for"


def _view(channel: grpc.Channel) -> Any:
    state = json.loads(channel.unary_unary(PROBE)(b"", timeout=_LIMIT_S))
    engines = [SimpleNamespace(queued_rows=lambda rows=rows: rows) for rows in state["queued_rows"]]
    pool = SimpleNamespace(threads=state["threads"], _free=state["free_threads"])
    models = SimpleNamespace(repository=SimpleNamespace(engines=engines), pool=pool)
    calls = SimpleNamespace(_in_flight=state["calls"])
    return SimpleNamespace(models=models, streams=state["streams"], tasks=state["tasks"], _calls=calls)
