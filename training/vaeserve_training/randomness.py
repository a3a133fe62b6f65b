"""Where every random number of a run comes from: a generator seeded by the run's seed and the place it is used at.

Nothing depends on how often a generator was asked before, so a resumed run draws what an uninterrupted one draws, and
an evaluation draws the same in any batch size.
"""

from __future__ import annotations

import math
from enum import IntEnum, unique

import numpy as np
import torch
from torch import Tensor

BLOCK_IMAGES = 64


@unique
class Stream(IntEnum):
    """What the numbers are for, so that no two uses share a generator's seed."""

    WEIGHTS = 0
    SHUFFLE = 1
    TRAINING = 2
    OBSERVATION = 3
    POSTERIOR = 4
    IMPORTANCE = 5
    PRIOR = 6
    GENERATED = 7
    PICTURES = 8


def seed_of(*key: int) -> int:
    """Return a 64-bit seed that is a function of the key, e.g. (seed, stream, epoch), by NumPy's SeedSequence."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device` for that key."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def image_noise(seed: int, stream: Stream, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """Return noise for images `start .. stop`, float32 (stop - start, *shape), on the CPU.

    Uniform in [0, 1) for Stream.OBSERVATION, N(0, 1) for Stream.POSTERIOR. Drawn in fixed blocks of images, so image
    i's noise is a function of (seed, stream, i, shape) alone.
    """
    draw = torch.rand if stream is Stream.OBSERVATION else torch.randn
    first, last = start // BLOCK_IMAGES, math.ceil(stop / BLOCK_IMAGES)
    blocks = [
        draw((BLOCK_IMAGES, *shape), generator=generator(seed, stream, block)) for block in range(first, max(last, 1))
    ]
    offset = start - first * BLOCK_IMAGES
    return torch.cat(blocks)[offset : offset + stop - start]
