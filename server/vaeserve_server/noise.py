"""Counter-based Gaussian noise: the seed contract of vae.proto, and nothing else.

Noise is drawn outside the graphs so that it is a pure function of (seed, row, latent size): a call that is batched with
others, cut in pieces, retried or answered by another replica gets the same bytes. `Generator.standard_normal` would not
do: NumPy promises the stream of a bit generator, not of a distribution.
"""

from __future__ import annotations

import math
import secrets

import numpy as np
from numpy.typing import NDArray

WORDS_PER_BLOCK = 4
_UINT64_MAX = 2**64 - 1
_COUNTER_MODULUS = 2**256


def draw_seed() -> int:
    """Return a fresh seed in [0, 2**53), so that clients whose numbers are doubles keep every digit."""
    return secrets.randbits(53)


def words(seed: int, first_row: int, rows: int, size: int) -> NDArray[np.uint64]:
    """Return the raw Philox4x64-10 words of `rows` rows, uint64 `(rows, 4 * ceil(size / 4))`.

    `seed` and `first_row` are in [0, 2**64); ValueError otherwise. One generator serves the whole call.
    """
    for name, value in (("seed", seed), ("first_row", first_row)):
        if not 0 <= value <= _UINT64_MAX:
            raise ValueError(f"{name} is {value}; it must be in [0, 2**64)")
    blocks_per_row = math.ceil(size / WORDS_PER_BLOCK)
    # NumPy increments the counter before it computes a block, hence the - 1.
    counter = (first_row * blocks_per_row - 1) % _COUNTER_MODULUS
    generator = np.random.Philox(key=seed, counter=counter)
    width = blocks_per_row * WORDS_PER_BLOCK
    return generator.random_raw(rows * width).reshape(rows, width)


def standard_normal(seed: int, first_row: int, rows: int, size: int) -> NDArray[np.float32]:
    """Return rows `first_row .. first_row + rows` of the seed's stream of N(0, 1) noise, float32 `(rows, size)`.

    Box and Muller (1958) on (word >> 11, plus one half) * 2**-53, in float64; see the seed contract in vae.proto.
    """
    uniforms = ((words(seed, first_row, rows, size) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniforms[:, 0::2]))  # (rows, width / 2)
    angle = (2.0 * np.pi) * uniforms[:, 1::2]
    normals = np.empty_like(uniforms)
    np.multiply(radius, np.cos(angle), out=normals[:, 0::2])
    np.multiply(radius, np.sin(angle), out=normals[:, 1::2])
    return normals[:, :size].astype(np.float32)
