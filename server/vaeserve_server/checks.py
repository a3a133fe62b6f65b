"""Values that no call may bring, and the words for them: float images outside 0..1, NaN and infinity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaeserve_server.errors import InvalidInputError

Array = NDArray[Any]
Floats = NDArray[np.float32]


def is_finite(array: Array) -> bool:
    """Return whether every element is finite."""
    # One pass and no temporary. A sum of finite values that overflows is settled by the slow way.
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(np.add.reduce(array, axis=None, dtype=np.float32)) or bool(np.isfinite(array).all())


def check_range(images: Array) -> None:
    """Raise InvalidInputError naming the first row of float images with a value that is not in 0..1."""
    if images.min() >= 0 and images.max() <= 1:  # NaN fails both
        return
    if not is_finite(images):
        raise not_finite("images", images)
    row, value = first(images, (images < 0) | (images > 1))
    raise InvalidInputError(
        "images", f"images row {row} has the value {value:.6g}; float images are in 0..1 (divide by 255, or send uint8)"
    )


def not_finite(field: str, rows: Array) -> InvalidInputError:
    """Return the error that names the first row of `rows` with a value that is not finite."""
    row, value = first(rows, ~np.isfinite(rows))
    return InvalidInputError(field, f"{field} row {row} has the value {value}; every value must be finite")


def first(rows: Array, bad: NDArray[np.bool_]) -> tuple[int, float]:
    """Return the first row with an element that `bad` marks, and that element."""
    position = int(np.argmax(bad))
    return position // (rows.size // len(rows)), float(rows.flat[position])
