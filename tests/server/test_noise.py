"""The seed contract, against an independent Philox in plain integers and the proto's own test vectors."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaeserve_server import noise

PROTO = Path(__file__).parents[2] / "protos/vaeserve/v1/vae.proto"
MASK = 2**64 - 1


def philox4x64(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 as Salmon et al. (2011) define it: ten rounds, Weyl key schedule."""
    k0, k1 = key
    x = [(counter >> (64 * i)) & MASK for i in range(4)]
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(product1 >> 64) ^ x[1] ^ k0, product1 & MASK, (product0 >> 64) ^ x[3] ^ k1, product0 & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return x


def reference_words(seed: int, row: int, size: int) -> list[int]:
    blocks = math.ceil(size / 4)
    return [word for j in range(blocks) for word in philox4x64((seed, 0), row * blocks + j)]


def reference_normals(words: list[int], size: int) -> list[float]:
    uniforms = [((word >> 11) + 0.5) * 2.0**-53 for word in words]
    normals = []
    for u, v in zip(uniforms[0::2], uniforms[1::2], strict=True):
        radius = math.sqrt(-2.0 * math.log(u))
        normals += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    return normals[:size]


def test_reference_is_philox() -> None:
    # The known-answer vector of Random123, philox4x64 10 with all-zero counter and key.
    assert philox4x64((0, 0), 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@given(seed=st.integers(0, MASK), first_row=st.integers(0, MASK), rows=st.integers(1, 5), size=st.integers(1, 23))
def test_words_and_normals_are_the_contract(seed: int, first_row: int, rows: int, size: int) -> None:
    expected = [reference_words(seed, first_row + row, size) for row in range(rows)]
    assert noise.words(seed, first_row, rows, size).tolist() == expected
    normals = np.array([reference_normals(words, size) for words in expected])
    drawn = noise.standard_normal(seed, first_row, rows, size)
    assert drawn.dtype == np.float32
    np.testing.assert_array_max_ulp(drawn, normals.astype(np.float32), maxulp=1)


def test_the_protos_vectors_hold() -> None:
    text = PROTO.read_text()
    words = {int(row): re.findall(r"0x[0-9a-f]{16}", rest) for row, rest in re.findall(r"row (\d) words(.*)", text)}
    values = {int(row): rest.split() for row, rest in re.findall(r"row (\d) noise(.*)", text)}
    assert set(words) == set(values) == {0, 1}
    for row in (0, 1):
        assert [f"{word:#018x}" for word in noise.words(7, row, 1, 2)[0].tolist()] == words[row]
        assert [f"{value:.8f}" for value in noise.standard_normal(7, row, 1, 2)[0]] == values[row]


@given(first_row=st.integers(0, 2**63), cut=st.integers(1, 9), size=st.integers(1, 9))
def test_a_row_depends_on_nothing_but_seed_and_row(first_row: int, cut: int, size: int) -> None:
    whole = noise.standard_normal(3, first_row, 10, size)
    parts = [noise.standard_normal(3, first_row, cut, size), noise.standard_normal(3, first_row + cut, 10 - cut, size)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_noise_is_standard_normal() -> None:
    drawn = noise.standard_normal(11, 0, 20_000, 3).astype(np.float64)
    assert abs(drawn.mean()) < 4 / math.sqrt(drawn.size)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / drawn.size)
    assert abs((drawn**4).mean() - 3) < 4 * math.sqrt(96 / drawn.size)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        noise.standard_normal(seed, 0, 1, 1)


def test_drawn_seeds_fit_a_double() -> None:
    seeds = {noise.draw_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**53 and int(float(seed)) == seed for seed in seeds)
