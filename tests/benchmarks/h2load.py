"""Closed loops by h2load (Debian's package nghttp2-client), a C program that is far from being the limit.

h2load counts a gRPC error as a success, for its HTTP status is 200. So the bytes are counted: an error has no data, and
the data of all answers together must be exactly the verified answer's length times the number of calls.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from children import BenchError, pin

_GIVE_UP_S = 120


def find() -> str | None:
    """Return where h2load is, None if it is not installed."""
    return shutil.which("h2load")


def closed_loop(
    *,
    port: int,
    path: str,
    body_file: Path,
    answer_bytes: int,
    in_flight: int,
    connections: int,
    calls: int,
    core: int | None,
) -> dict[str, float]:
    """Make calls with `in_flight` of them under way at any time; return calls_per_s and the generator's cpu_share."""
    command = [
        "h2load",
        f"--requests={calls}",
        f"--clients={connections}",
        f"--max-concurrent-streams={-(-in_flight // connections)}",
        f"--data={body_file}",
        "--header=content-type: application/grpc",
        "--header=te: trailers",
        f"http://127.0.0.1:{port}{path}",
    ]
    cpu_began, began = os.times(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pin(process.pid, core)
    try:
        output, _ = process.communicate(timeout=_GIVE_UP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise BenchError(f"h2load made no end of {calls} calls in {_GIVE_UP_S} s") from None
    elapsed_s, cpu_ended = time.perf_counter() - began, os.times()
    _check(output, calls, answer_bytes)
    found = re.search(r"([\d.]+) req/s", output)
    if not found:
        raise BenchError(f"h2load's answer is not understood: {output!r}")
    cpu_s = cpu_ended.children_user + cpu_ended.children_system - cpu_began.children_user - cpu_began.children_system
    return {"calls_per_s": float(found[1]), "cpu_share": cpu_s / elapsed_s}


def _check(output: str, calls: int, answer_bytes: int) -> None:
    succeeded = re.search(r"(\d+) succeeded", output)
    data = re.search(r"\((\d+)\) data", output)
    if not succeeded or not data:
        raise BenchError(f"h2load failed: {output.strip()[-300:]}")
    if int(succeeded[1]) != calls or int(data[1]) != calls * answer_bytes:
        raise BenchError(
            f"h2load got {data[1]} bytes of data in {succeeded[1]} answers; {calls} good ones have "
            f"{calls * answer_bytes}: some calls were answered with an error"
        )
