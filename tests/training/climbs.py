"""A ladder of --full's shape and of no size, and a program that climbs it and kills itself on the way.

    python climbs.py OUT STEP KILL_AT WORKERS

KILL_AT is `trained:N` (when training has told N optimiser steps) or `measured:N` (at the N-th function call of the
step's measuring).
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from killer import Killer
from vaeserve_training.config import ModelConfig, PriorConfig, preset
from vaeserve_training.data import ImageData
from vaeserve_training.ladder import climb
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.results import Findings
from vaeserve_training.ladder.scale import FULL
from vaeserve_training.progress import Bar

TINY = FULL.model_copy(
    update={
        "name": "tiny",
        "base": preset("mnist").with_changes(
            model={"channels": (2, 4), "hidden": (8,), "latent_size": 3}, optimiser={"warmup_steps": 2}
        ),
        "train_images": 120,
        "growing_images": (40, 80, 120),
        "steps": 4,
        "snapshots": (0, 2),
        "betas": (0.1, 1.0),
        "plane": ModelConfig(latent_size=2, channels=(2, 4), hidden=(8,)),
        "deconvolution": ModelConfig(latent_size=2, channels=(2, 4), hidden=(8,)),
        "constant_steps": 4,
        "one_hot_images": (1, 3),
        "one_hot_steps": 4,
        "vector_sizes": (1, 2),
        "vector_steps": 4,
        "samples": 100,
        "prior": PriorConfig(couplings=2, hidden=8, steps=4, batch_size=32),
        "draws": 50,
        "classifier_epochs": 1,
    }
)


def noise_with_labels() -> ImageData:
    """120 training and 100 test images of 8x8 noise, of two classes: brighter above or below."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=220)
    bright = np.where(np.arange(8)[:, None] // 4 == labels[:, None, None], 255, 60)  # (220, 8, 1)
    images = (rng.random((220, 8, 8)) * bright).astype(np.uint8)[:, None]
    train, test = images[:120], images[120:]
    return ImageData(
        "noise", train, test, labels[:120], labels[120:], binarised=False, sha256=hashlib.sha256(train).hexdigest()
    )


def kill_when_trained(steps: int) -> None:
    """End this process when training has told so many optimiser steps."""
    told = 0
    advance = Bar.advance

    def counted(bar: Bar, count: int = 1) -> None:
        nonlocal told
        told += count
        if told >= steps:
            os.kill(os.getpid(), signal.SIGKILL)
        advance(bar, count)

    Bar.advance = counted  # type: ignore[method-assign]


def kill_when_measured(number: int, calls: int) -> None:
    """End this process at that function call of the step's measuring."""
    step = climb.STEPS[number]

    def measured(lab: Lab) -> Findings:
        sys.setprofile(Killer(f"calls:{calls}"))
        return step.measure(lab)

    climb.STEPS[number] = replace(step, measure=measured)


if __name__ == "__main__":
    out, number, (phase, moment), workers = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(":"), sys.argv[4]
    if phase == "trained":
        kill_when_trained(int(moment))
    else:
        kill_when_measured(number, int(moment))
    climb.climb(TINY, noise_with_labels(), out, numbers=(number,), device="cpu", workers=int(workers))
