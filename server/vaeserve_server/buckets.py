"""The few batch sizes that a GPU is given, each prepared before it serves.

cuDNN picks kernels, and ONNX Runtime plans memory, anew for every shape it meets; a caller should never pay for that.
Padding to the next power of two costs a GPU next to nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to `max_rows`, itself included."""
    powers = [1 << exponent for exponent in range(max_rows.bit_length())]
    return (*(size for size in powers if size < max_rows), max_rows)


def bucket_for(rows: int, sizes: Sequence[int]) -> int:
    """Return the smallest of the ascending `sizes` that holds `rows`; ValueError if none does."""
    place = bisect_left(sizes, rows)
    if place == len(sizes):
        raise ValueError(f"a batch of {rows} rows is larger than the largest size, {sizes[-1]}")
    return sizes[place]
