"""Arrays that users bring: .npy and .npz files in the layouts people use, turned into uint8 images."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaeserve_training.sources import DataError

MAX_CHANNELS = 4
_ROWS_AT_ONCE = 4096  # floating-point arrays are converted piece by piece, to keep the extra memory small


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an .npz file by name, or of an .npy file as `images`; no pickle is ever loaded.

    Raises DataError if the file is missing, damaged or of another kind.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"images": loaded}
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an .npy or .npz file: {error}") from error


def as_images(array: NDArray[np.generic], origin: str) -> NDArray[np.uint8]:
    """Return `array` as uint8 (N, C, H, W); `origin` names it in errors.

    Takes (N, H, W), (N, H, W, C) or (N, C, H, W), C at most 4, as uint8 0..255 or floating point 0..1, which is
    rounded to the nearest of 256 levels. Raises DataError for anything else.
    """
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{origin} has shape {array.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[1] > MAX_CHANNELS and array.shape[3] <= MAX_CHANNELS:
        array = np.moveaxis(array, 3, 1)
    elif array.shape[1] > MAX_CHANNELS or min(array.shape[2:]) <= MAX_CHANNELS:
        raise DataError(
            f"{origin} has shape {array.shape}, of which neither (N, H, W, C) nor (N, C, H, W) can be told; "
            f"expected 1 to {MAX_CHANNELS} channels and larger images"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{origin} is {array.dtype}; expected uint8 (0..255) or floating point (0..1)")
    return _from_floats(array, origin)


def _from_floats(array: NDArray[np.generic], origin: str) -> NDArray[np.uint8]:
    images = np.empty(array.shape, dtype=np.uint8)
    for first in range(0, len(array), _ROWS_AT_ONCE):
        rows = array[first : first + _ROWS_AT_ONCE].astype(np.float64)
        bad = ~((rows >= 0) & (rows <= 1))  # so that NaN is bad too
        if bad.any():
            row = first + int(np.flatnonzero(bad.any(axis=(1, 2, 3)))[0])
            raise DataError(f"{origin}: row {row} holds {rows[bad][0]:g}; floating-point pixels must be in 0..1")
        images[first : first + _ROWS_AT_ONCE] = np.rint(rows * 255)
    return images
