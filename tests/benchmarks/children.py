"""Processes that a benchmark starts: servers, and workers that answer one line of JSON with another.

Each side of a comparison is a process of its own, so that no figure contains another one's threads or interpreter lock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
_ANSWER_S = 300.0
_STOP_S = 40.0


class BenchError(Exception):
    """The benchmark cannot go on; the message says why and what to do."""


class Child:
    """A running process; what it writes to standard error goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._name = log.stem
        self._log = log
        with log.open("a") as log_file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log_file, text=True
            )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def line(self) -> str:
        """Return the next line that it prints; BenchError with its last words if it ends or is silent instead."""
        assert self._process.stdout
        limit = threading.Timer(_ANSWER_S, self._process.kill)
        limit.start()
        line = self._process.stdout.readline()
        limit.cancel()
        if not line:
            raise BenchError(f"{self._name} gave no answer; {self.last_words()}")
        return line.rstrip("\n")

    def ask(self, **request: Any) -> Any:
        """Send a worker one request and return its answer."""
        assert self._process.stdin
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise BenchError(f"{self._name} has ended; {self.last_words()}") from None
        return json.loads(self.line())

    def last_words(self) -> str:
        """Return the end of its log, and where the rest is."""
        lines = self._log.read_text().strip().splitlines()
        return f"it last said: {lines[-1]} (all of it is in {self._log})" if lines else "it said nothing"

    def stop(self) -> None:
        """End it: a server drains, a worker's input ends."""
        assert self._process.stdin and self._process.stdout
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def worker(script: str, log: Path, *arguments: str) -> Child:
    """Start one of the workers beside this file."""
    return Child([sys.executable, str(HERE / script), *arguments], log)


def serve(verbs: Mapping[str, Callable[..., Any]]) -> None:
    """Be a worker: answer requests until standard input ends. Each names its verb under "do"."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(verbs[request.pop("do")](**request)), flush=True)


def pin(pid: int, core: int | None) -> None:
    """Keep a process (0: this one) on one core, where the system can."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(pid, {core})


def resident_bytes(pid: int) -> int:
    """Return the memory that a process and its children hold at this moment; 0 where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident_bytes, _children(pid)))


def cpu_s(pid: int) -> float:
    """Return the processor time of a process and its children, those that have ended too; 0 without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_s, _children(pid)))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, file.read_text().split())
        except OSError:
            continue  # a thread that has ended meanwhile
    return found
