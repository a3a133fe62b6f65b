"""The run's `metrics.jsonl`: one JSON object an epoch, without gaps or repeats however often the run was cut off.

A record is on the disk before its epoch's checkpoint is. So after a kill the file may be ahead of the checkpoint, never
behind it, and resuming drops what is ahead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from vaeserve_training import atomic

FILE = "metrics.jsonl"
Record = dict[str, float | int]


def read(path: Path) -> list[Record]:
    """Return the file's records, none if there is no file. A last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def truncate(path: Path, epoch: int) -> None:
    """Drop the records of epochs after `epoch`."""
    kept = [record for record in read(path) if record["epoch"] <= epoch]
    atomic.write_file(path, b"".join(_line(record) for record in kept))


def append(path: Path, record: Record) -> None:
    """Add one record and flush it to the disk."""
    with atomic.naming(path), path.open("ab") as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"
