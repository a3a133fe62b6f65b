"""The server of a soak: its process or processes, signals, metrics and figures over time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from metrics_page import Page, read
from soak_models import PINNED
from soak_watch import Figures, Sample, figures

_PERIOD_S = 0.5
_LIMIT_S = 60.0


class SoakServer:
    """`vaeserve-server` on a free port, watched from the start on."""

    def __init__(self, models: Path, log: Path, *, transport: str, workers: int, watch_s: float) -> None:
        """Start it, and return when it serves."""
        self._log = log
        self._workers = workers
        flags = ["--device", "cpu", "--port", "0", "--metrics-port", "0", "--pin", PINNED, "--watch-s", str(watch_s)]
        flags += ["--transport", transport, *(["--workers", str(workers)] if workers > 1 else [])]
        command = [sys.executable, "-m", "vaeserve_server", "--models", str(models), *flags]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("VAESERVE_")}
        with log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=variables)
        assert self._process.stdout is not None
        ready_line = self._process.stdout.readline()
        if not ready_line:
            raise RuntimeError(f"the server did not start: {self.log()}")
        self.target = ready_line.split(" on ")[1].split(" ")[0]
        self.samples: dict[int, list[Sample]] = {}
        self.kills = 0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def log(self) -> str:
        """Return what it has logged."""
        return self._log.read_text()

    def serving(self) -> list[int]:
        """Return the processes that serve now."""
        if self._workers == 1:
            return [self._process.pid]
        pids = [int(pid) for pid in re.findall(r"worker ready pid=(\d+)", self.log())]
        ended = {int(pid) for pid in re.findall(r"a worker ended pid=(\d+)", self.log())}
        return [pid for pid in pids if pid not in ended]

    def page(self) -> Page:
        """Return the metrics of now."""
        (url,) = re.findall(r"INFO metrics url=(\S+)", self.log())
        return read(url)

    def kill_one(self) -> None:
        """Kill the youngest worker, and wait for the one in its place; the oldest lives through it all."""
        os.kill(self.serving()[-1], signal.SIGKILL)
        self.kills += 1
        self._until(lambda: len(self.serving()) == self._workers and self._restarts() == self.kills)

    def hang_up(self) -> None:
        """Ask for a reload."""
        self._process.send_signal(signal.SIGHUP)

    def rest(self) -> Page:
        """Wait until nothing is left of the calls, and return the metrics of then."""

        def quiet() -> bool:
            page = self.page()
            return not (page("vaeserve_calls_in_flight") or page("vaeserve_queue_rows"))

        self._until(quiet)
        return self.page()

    def figures(self) -> dict[int, Figures]:
        """Stop watching, and return the figures of now of the processes that serve."""
        self._stop.set()
        self._sampler.join()
        return {pid: figures(pid) for pid in self.serving()}

    def stop(self) -> int:
        """Drain it; return the exit status."""
        self._stop.set()
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_LIMIT_S)
        finally:
            self._process.kill()

    def _restarts(self) -> int:
        return self.log().count("worker ready pid=") - self._workers

    def _sample(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            for pid in self.serving():
                try:
                    now = figures(pid)
                except OSError:  # just killed
                    continue
                self.samples.setdefault(pid, []).append(Sample(time.monotonic(), now))

    @staticmethod
    def _until(holds: object) -> None:
        assert callable(holds)
        deadline = time.monotonic() + _LIMIT_S
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError("the server did not come to rest")
            time.sleep(0.05)
