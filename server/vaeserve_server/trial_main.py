"""The process in which a version is tried: loads and warms it as the server would, and says how that went.

Settings come on standard input, the model's name and version as arguments. One line comes out: with status 0 the
bundle's fingerprint, with status 1 what is wrong with it. Any other end is ONNX Runtime's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from functools import partial
from pathlib import Path

from vaeserve_server import models, trial
from vaeserve_server.bundle import read_bundle
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings

_DIE_WITH_PARENT, _KILL = 1, 9  # prctl's PR_SET_PDEATHSIG, SIGKILL


def main() -> int:
    """Try the version that the arguments name; return the exit status."""
    _stand_back()
    settings = Settings.model_validate_json(sys.stdin.read()).model_copy(update={"threads": 1, "workers": 1})
    try:
        said, status = asyncio.run(_load(settings, *sys.argv[1:])), 0
    except StartError as error:
        said, status = str(error), 1
    sys.stdout.write(f"{said}\n")
    sys.stdout.flush()
    os._exit(status)  # what a graph has broken may yet break the end


def _stand_back() -> None:
    """Let the server go first, for processor time and for memory, and do not outlive it."""
    with contextlib.suppress(OSError):
        os.nice(10)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_DIE_WITH_PARENT, _KILL)


async def _load(settings: Settings, name: str, version: str) -> str:
    runtime = await asyncio.to_thread(models.new_runtime, settings)
    new_engine = models.engine_maker(settings, runtime, models.new_pool(settings, runtime))
    bundle = await asyncio.to_thread(read_bundle, settings.models, name, version)
    await asyncio.to_thread(partial(new_engine, bundle))
    return trial.fingerprint(bundle)


if __name__ == "__main__":
    sys.exit(main())
