"""Tiny runs for the tests of training, and a program that trains them in processes that are killed on the way.

    python runs.py

reads lines, KILL_AT and RUN_DIR, and answers each with how that run ended: its process's exit status, negative for a
signal. KILL_AT is `calls:N` (the N-th function call, wherever that is), `fsync:N`, `rename:N` (inside writing a
checkpoint), or `seconds:X` (by another process, wherever that is). Each run is a fork of the program, which has trained
once: to import PyTorch takes longer than they do.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from killer import Killer, kill_after
from vaeserve_training.config import TrainConfig
from vaeserve_training.data import ImageData
from vaeserve_training.fit import fit


def tiny_config(**sections: dict[str, Any]) -> TrainConfig:
    """A model of a few hundred weights; 4 epochs of 7 steps, the last of each a smaller batch."""
    tiny: dict[str, dict[str, Any]] = {
        "data": {"image_shape": (1, 4, 4)},
        "model": {"channels": (3,), "hidden": (8,), "latent_size": 2},
        "optimiser": {"epochs": 4, "batch_size": 16, "warmup_steps": 5, "ema_decay": 0.9},
        "objective": {},
        "run": {"threads": 1, "device": "cpu", "monitor_images": 10},
    }
    return TrainConfig().with_changes(**{name: values | sections.get(name, {}) for name, values in tiny.items()})


def tiny_data(shape: tuple[int, int, int] = (1, 4, 4), seed: int = 0) -> ImageData:
    """100 training and 30 test images of noise, brighter in the middle rows."""
    rng = np.random.default_rng(seed)
    images = (rng.random((130, *shape)) * np.linspace(60, 255, shape[1])[:, None]).astype(np.uint8)
    train, test = images[:100], images[100:]
    return ImageData("tiny", train, test, None, None, binarised=False, sha256=hashlib.sha256(train).hexdigest())


def warm_up() -> None:
    """Train once, so that PyTorch's late imports, most of a process's first calls, lie behind."""
    with tempfile.TemporaryDirectory() as folder:
        fit(tiny_config(optimiser={"epochs": 1}), Path(folder), data=tiny_data())


def run_until_killed(kill_at: str, run_dir: Path) -> int:
    """Train, or go on, in a fork of this process; return how it ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        if kill_at.startswith("seconds:"):
            kill_after(float(kill_at.removeprefix("seconds:")))
        else:
            sys.setprofile(Killer(kill_at))
        fit(tiny_config(), run_dir, resume=True, data=tiny_data())
        status = 0
    except BaseException:  # noqa: BLE001 - told, and the fork must not go on as its parent
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        how, _, where = line.rstrip("\n").partition(" ")
        print(run_until_killed(how, Path(where)), flush=True)
    os._exit(0)  # spares the seconds that PyTorch takes to end
