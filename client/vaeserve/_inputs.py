"""What users have (arrays, lists, PIL images, iterators) -> rows as the contract wants them.

Only what can be meant in one way is accepted; values are left to the server, which looks at them anyway.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Sequence
from typing import Any

import numpy as np

from vaeserve._results import Array, Encoding, ModelInfo
from vaeserve.errors import InvalidArgument, invalid

# What the verbs take. PIL images and tensors of other libraries are known by duck typing, hence Any.
ImageInput = Array | Sequence[Any] | Iterable[Any] | Any
LatentInput = Encoding | Array | Sequence[Any] | Iterable[Any] | Any

_WIRE_FLOATS = (2, 4)  # item sizes
_IMAGE_DTYPES = frozenset(map(np.dtype, ("u1", "f4", "f2")))


def is_stream(given: object) -> bool:
    """Tell an iterator of rows, whose length is not known and which may not fit in memory, from rows at hand."""
    if isinstance(given, (np.ndarray, list, tuple, str, bytes, Encoding)) or _is_array_like(given):
        return False
    return isinstance(given, (Iterable, AsyncIterable))


def as_images(given: ImageInput, info: ModelInfo) -> Array:
    """Return images as uint8, float32 or float16 `(N, C, H, W)` for this model.

    Takes `(N, C, H, W)`, `(N, H, W, C)`, one image `(C, H, W)` or `(H, W, C)`, for a grey model also `(N, H, W)` and
    `(H, W)`; a PIL image; a list of any of these. uint8, float32 and float16 are kept, float64 becomes float32, and
    bool becomes uint8 0 and 255. Raises InvalidArgument for anything else.
    """
    if type(given) is np.ndarray and given.shape[1:] == info.image_shape and given.dtype in _IMAGE_DTYPES:
        return given  # as nearly always, and a call of one image costs little more than its Python
    if isinstance(given, (list, tuple)) and given and all(map(_is_array_like, given)):
        return _join([as_images(each, info) for each in given], "images")
    if _is_picture(given):
        given = _read_picture(given, info)
    array = _read_array(given, "images", info.image_shape)
    fitted = _fit_images(array, info.image_shape)
    if fitted is None:
        raise _wrong_shape("images", array.shape, info.image_shape, info)
    kind, size = array.dtype.kind, array.dtype.itemsize
    if array.dtype == np.uint8 or (kind == "f" and size in _WIRE_FLOATS):
        return fitted
    if kind == "f":
        return _to_float32(fitted)
    if kind == "b":
        return fitted.astype(np.uint8) * np.uint8(255)
    raise _wrong_dtype("images", array.dtype, "uint8 or float32 or float16", info)


def as_latents(given: LatentInput, info: ModelInfo) -> Array:
    """Return latents as float32 or float16 `(N, *latent_shape)` for this model.

    Takes `(N, *latent_shape)`, one latent `latent_shape`, an Encoding (its means), a list of any of these; float16 is
    kept, other floats and integers become float32. Raises InvalidArgument for anything else.
    """
    if isinstance(given, Encoding):
        given = given.mean
    if isinstance(given, (list, tuple)) and given and all(isinstance(e, Encoding) or _is_array_like(e) for e in given):
        return _join([as_latents(each, info) for each in given], "latents")
    array = _read_array(given, "latents", info.latent_shape)
    if array.shape == info.latent_shape:
        array = array[np.newaxis]
    if array.shape[1:] != info.latent_shape:
        raise _wrong_shape("latents", array.shape, info.latent_shape, info)
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "f" and size in _WIRE_FLOATS:
        return array
    if kind in "fiub":
        return _to_float32(array)
    raise _wrong_dtype("latents", array.dtype, "float32 or float16", info)


def _wrong_shape(field: str, shape: tuple[int, ...], row_shape: tuple[int, ...], info: ModelInfo) -> InvalidArgument:
    """Return the error for rows of another shape than the model's, in the server's words."""
    if len(shape) == len(row_shape) + 1:
        words = f"{field} have shape {shape[1:]}; model {info.ref} takes {row_shape}"
    else:
        with_rows = ", ".join(["N", *map(str, row_shape)])
        words = f"{field} have shape {shape} in all; model {info.ref} takes ({with_rows}), N rows of shape {row_shape}"
    return invalid(field, words, model=str(info.ref))


def _wrong_dtype(field: str, dtype: np.dtype[Any], taken: str, info: ModelInfo) -> InvalidArgument:
    """Return the error for elements that are not numbers of a kind the model takes, in the server's words."""
    return invalid(field, f"{field} are {dtype.name}; model {info.ref} takes {taken}", model=str(info.ref))


def _fit_images(array: Array, image_shape: tuple[int, ...]) -> Array | None:
    """Return `array` as rows (N, C, H, W) if its shape can be meant in one way only, else None."""
    channels, height, width = image_shape
    channels_last = (height, width, channels)
    if array.shape in (image_shape, channels_last) or (channels == 1 and array.shape == (height, width)):
        array = array[np.newaxis]  # one image
    if channels == 1 and array.shape[1:] == (height, width):
        array = array[:, np.newaxis]
    elif array.shape[1:] == channels_last and channels_last != image_shape:
        array = np.moveaxis(array, 3, 1)
    return array if array.shape[1:] == image_shape else None


def _is_picture(given: object) -> bool:
    """Tell a PIL image by what is used of it, so that the SDK needs no Pillow."""
    return hasattr(given, "mode") and hasattr(given, "convert") and hasattr(given, "getbands")


def _is_array_like(given: object) -> bool:
    return hasattr(given, "__array__") or hasattr(given, "__array_interface__") or _is_picture(given)


def _read_picture(picture: Any, info: ModelInfo) -> Array:
    """Return a PIL image's pixels; palette, alpha, CMYK and bilevel ones become what the model's channels mean."""
    mode = {1: "L", 3: "RGB"}.get(info.image_shape[0])
    return np.asarray(picture if mode in (None, picture.mode) else picture.convert(mode))


def _read_array(given: Any, field: str, row_shape: tuple[int, ...]) -> Array:
    if isinstance(given, np.ndarray):
        return given
    if isinstance(given, (list, tuple)) and not given:
        return np.zeros((0, *row_shape), dtype=np.float32)
    if isinstance(given, (list, tuple)) or _is_array_like(given):
        try:
            array: Array = np.asarray(given)
        except ValueError:  # NumPy's word for rows of different lengths
            array = np.empty(0, dtype=object)
        if array.dtype != object:
            return array
        raise invalid(field, f"{field} are a {type(given).__name__} whose elements do not form one array of numbers")
    what = "arrays, PIL images or an iterable of them" if field == "images" else "an Encoding, arrays or an iterable"
    raise invalid(field, f"{field} are a {type(given).__name__}; give {what}")


def _join(rows: list[Array], field: str) -> Array:
    dtypes = {array.dtype.newbyteorder("=") for array in rows}
    if len(dtypes) > 1:
        names = " and ".join(sorted(map(str, dtypes)))
        raise invalid(field, f"{field} mix {names}; give rows of one dtype")
    return np.concatenate(rows)


def _to_float32(array: Array) -> Array:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which the server names with its row
        return array.astype(np.float32)
