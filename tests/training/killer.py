"""SIGKILL at a chosen moment of this process: at a function call, a file operation, or by the clock."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

_FILE_OPERATIONS = frozenset(
    {"open", "write", "flush", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir", "__exit__"}
)


class Killer:
    """Counts events of the interpreter's profiler and ends the process with SIGKILL at one of them."""

    def __init__(self, kill_at: str) -> None:
        self.kind, number = kill_at.split(":")
        self.left = int(number)
        self.seen = 0

    def __call__(self, _frame: object, event: str, argument: Any) -> None:
        if event not in {"call", "c_call"}:
            return
        name = getattr(argument, "__name__", "")
        if self.kind == "files" and name not in _FILE_OPERATIONS:
            return
        if self.kind not in {"calls", "files"} and name != self.kind:
            return
        self.seen += 1
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_after(seconds: float) -> None:
    """Let a process of its own end this one after so long, in whatever it then is."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(victim, signal.SIGKILL)
        os._exit(0)
