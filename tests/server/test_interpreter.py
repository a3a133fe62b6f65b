"""A server's life runs in uvloop's event loop where there is one, with the collector and the turns of threads set."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIFE = """
import asyncio, gc, json, sys
{before}
from vaeserve_server import interpreter

async def life():
    print(json.dumps([type(asyncio.get_running_loop()).__module__.partition(".")[0], gc.get_freeze_count() > 1000]))
    if sys.argv[1:]:
        raise ValueError("as it was")

interpreter.run(life())
"""


def live(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIFE.format(before=before), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("before", "loop"), [("", "uvloop"), ("sys.modules['uvloop'] = None", "asyncio")])
def test_the_loop_is_uvloops_where_there_is_one(before: str, loop: str) -> None:
    done = live(before)
    assert done.stdout == f'["{loop}", true]\n', done.stderr


def test_what_a_life_raises_is_raised() -> None:
    assert "ValueError: as it was" in live("", "raise").stderr
