"""How this process's Python runs: its garbage collector, the turns of its threads, its event loop.

Measured with single-image Encodes, 32 in flight, on two cores, grpcio's server: the collector and the event loop each
cost an eighth of the server's processor time as they come, the turns a twentieth.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
from collections.abc import Coroutine
from typing import Any

# A call makes some hundred objects and frees them all by their counts. Python's own threshold, 700, looks for circles
# among them every few calls, and finds none.
_COLLECT_AFTER = (10_000, 20, 50)
# Threads that want the interpreter are the event loop's and the runs'. With Python's 5 ms one that computes keeps the
# others waiting longer than a call takes.
_SWITCH_INTERVAL_S = 0.0005
# What the threads are called that load and run graphs: for minutes, or for ever, where one hangs.
_IN_GRAPHS = ("load", "reload", "run-")


def tune() -> None:
    """Set up the garbage collector and the turns of threads. Call it once, when all that lives for ever is imported."""
    gc.collect()
    gc.freeze()  # or every full collection would go through all modules again
    gc.set_threshold(*_COLLECT_AFTER)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a server's life in an event loop: uvloop's where it is installed, which costs less.

    Where a graph does not end the process ends here, with status 0.
    """
    tune()
    try:
        import uvloop  # noqa: PLC0415 - there is none for Windows
    except ModuleNotFoundError:
        asyncio.run(main)
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main)
    if any(thread.daemon and thread.name.startswith(_IN_GRAPHS) for thread in threading.enumerate()):
        # A thread that comes back from ONNX Runtime to a Python that is ending has the C library abort the process.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
