"""Arrays that users bring: .npy and .npz files in the layouts people use, turned into uint8 images."""

from __future__ import annotations

import lzma
import math
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vaeserve_training.sources import DataError

MAX_CHANNELS = 4
_SMALL_BYTES = 2**30
_MAX_RATIO = 100  # of images, even black and white ones; gzip data of nothing but zeros reach a thousand
_HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,  # a password
    NotImplementedError,  # a way of compressing that Python does not know
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)
_ROWS_AT_ONCE = 4096  # floating-point arrays are converted piece by piece, to keep the extra memory small


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an .npz file by name, or of an .npy file as `images`; no pickle is ever loaded.

    Raises DataError if the file is missing, damaged or of another kind, or if an array claims to be larger than the
    file or the memory.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise ValueError("it is no plain file")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_members(archive)
        with path.open("rb") as file:
            _check_claim(file, path.stat().st_size)
            return {"images": np.load(file, allow_pickle=False)}
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read as an .npy or .npz file: {error}") from error
    except MemoryError:
        raise DataError(f"{path} holds more than there is memory for; split it, or use a folder of images") from None


def _read_members(archive: zipfile.ZipFile) -> dict[str, NDArray[np.generic]]:
    unpacked = sum(member.file_size for member in archive.infolist())
    packed = sum(member.compress_size for member in archive.infolist())
    if unpacked > _SMALL_BYTES and unpacked > _MAX_RATIO * packed:
        raise ValueError(f"{packed} bytes that unpack to {unpacked} are no images; save them with np.savez")
    arrays = {}
    for member in archive.infolist():
        with archive.open(member) as file:
            _check_claim(file, member.file_size)
            arrays[member.filename.removesuffix(".npy")] = np.load(file, allow_pickle=False)
    return arrays


def _check_claim(file: IO[bytes], size: int) -> None:
    """Raise ValueError if the array's header asks for more than `size` bytes: NumPy would first make room for it."""
    version = np.lib.format.read_magic(file)
    read_header = _HEADERS.get(version)
    if read_header is None:
        raise ValueError(f"it is of .npy version {version}; arrays of numbers are of {' or '.join(map(str, _HEADERS))}")
    shape, _, dtype = read_header(file)
    claimed = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and claimed > size:
        raise ValueError(f"its header says {dtype} {shape}, {claimed} bytes, but there are {size}")
    file.seek(0)


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
