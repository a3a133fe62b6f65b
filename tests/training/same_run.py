"""Two runs that must be one and the same, and runs that are killed on the way."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import runs
from vaeserve_training import checkpoint, metrics


def everything(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, averaged weights, optimiser state."""
    header = checkpoint.read_header(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in (checkpoint.WEIGHTS, checkpoint.EMA):
        for name, tensor in checkpoint.read_weights(path / file).items():
            tensors[f"{file}/{name}"] = tensor
    state = torch.load(path / checkpoint.OPTIMISER, weights_only=True)["state"]
    for index, values in state.items():
        for name, tensor in values.items():
            tensors[f"optimiser/{index}/{name}"] = tensor
    assert header.progress.epoch == header.config.optimiser.epochs
    return tensors


def assert_same_run(one: Path, other: Path) -> None:
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    assert len(first) > 20
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert records(one) == records(other)


def records(path: Path) -> list[metrics.Record]:
    """The run's records without the seconds they took."""
    found = metrics.read(path.parent.parent / metrics.FILE)
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


Kill = Callable[[Path, str], None]


@contextlib.contextmanager
def killer() -> Iterator[Kill]:
    """Yield what trains in another process until that is killed; whatever it leaves must be a state to go on from.

    By the clock the process may be faster than its end.
    """
    command = [sys.executable, runs.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def kill(run_dir: Path, kill_at: str) -> None:
            print(kill_at, run_dir, file=program.stdin, flush=True)
            status = int(program.stdout.readline())
            assert status in ({-signal.SIGKILL, 0} if kill_at.startswith("seconds:") else {-signal.SIGKILL})
            for path in checkpoint.all_of(run_dir):
                checkpoint.load(path)

        yield kill
