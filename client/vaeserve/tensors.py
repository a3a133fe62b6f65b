"""ndarray <-> Tensor: the only wire codec, used by the SDK and by the server.

Decoding does not copy: the array is a read-only view of the message's bytes.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vaeserve.v1 import vae_pb2

FLOAT32 = vae_pb2.DATA_TYPE_FLOAT32
UINT8 = vae_pb2.DATA_TYPE_UINT8
FLOAT16 = vae_pb2.DATA_TYPE_FLOAT16

MAX_RANK = 8
_MOST_BYTES = 2**31 - 1  # of a message, as protobuf has it

# The wire is little-endian, so the dtypes say so; on a little-endian machine they are the native ones.
_DTYPES: tuple[tuple[vae_pb2.DataType, np.dtype[np.generic]], ...] = (
    (FLOAT32, np.dtype("<f4")),
    (UINT8, np.dtype("u1")),
    (FLOAT16, np.dtype("<f2")),
)
_NUMPY_DTYPES: dict[int, np.dtype[np.generic]] = dict(_DTYPES)
_WIRE_DTYPES = {dtype: wire for wire, dtype in _DTYPES}


class TensorError(ValueError):
    """A Tensor message that is not one array. `field` is the offending field of Tensor, '' for the whole."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(description)
        self.field = field


def numpy_dtype(wire_dtype: int) -> np.dtype[np.generic]:
    """Return the NumPy dtype of a DataType; TensorError naming the known ones if there is none."""
    try:
        return _NUMPY_DTYPES[wire_dtype]
    except KeyError:
        known = ", ".join(f"{vae_pb2.DataType.Name(wire)} ({wire})" for wire, _ in _DTYPES)
        given = f"dtype {wire_dtype} is not one of" if wire_dtype else "dtype is not set; set one of"
        raise TensorError("dtype", f"{given} {known}") from None


def to_tensor(array: NDArray[np.generic]) -> vae_pb2.Tensor:
    """Return `array` (float32, uint8 or float16, any shape and memory layout) as a message; TypeError otherwise."""
    tensor = vae_pb2.Tensor()
    write_tensor(array, tensor)
    return tensor


def write_tensor(array: NDArray[np.generic], tensor: vae_pb2.Tensor) -> None:
    """Write `array` into an empty message, as `to_tensor` does: in place where it belongs, it is not copied again."""
    wire_dtype = _WIRE_DTYPES.get(array.dtype)
    if wire_dtype is None:
        wire_dtype = _WIRE_DTYPES.get(array.dtype.newbyteorder("<"))
        if wire_dtype is None:
            raise TypeError(f"an array of {array.dtype} has no wire type; use float32, uint8 or float16")
        array = array.astype(_NUMPY_DTYPES[wire_dtype])
    tensor.dtype = wire_dtype
    tensor.shape.extend(array.shape)
    tensor.data = np.asarray(array).tobytes()  # a masked array's own would put its fill value in


def from_tensor(tensor: vae_pb2.Tensor) -> NDArray[np.generic]:
    """Return the message's elements as a read-only array that shares its bytes.

    Raises TensorError if dtype is unknown, an axis is negative, there are more than MAX_RANK axes, or the data is not
    exactly product(shape) * size(dtype) bytes long. Never allocates: a huge shape with little data is refused.
    """
    return from_bytes(tensor.data, numpy_dtype(tensor.dtype), tuple(tensor.shape[:]))


def from_bytes(data: bytes, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Return `data` as a read-only array that shares its bytes; TensorError as from `from_tensor`."""
    if len(shape) > MAX_RANK:
        raise TensorError("shape", f"shape has {len(shape)} axes; at most {MAX_RANK} are allowed")
    if shape and min(shape) < 0:
        raise TensorError("shape", f"shape {shape} has a negative axis")
    expected_bytes = math.prod(shape) * dtype.itemsize  # Python integers: no overflow
    if expected_bytes > _MOST_BYTES:  # no data could be right, so the data are not to blame
        raise TensorError("shape", f"shape {shape} of {dtype.name} is too large: {expected_bytes} bytes")
    if len(data) != expected_bytes:
        raise TensorError("data", f"data has {len(data)} bytes; shape {shape} of {dtype.name} takes {expected_bytes}")
    try:
        return np.ndarray(shape, dtype, data)
    except ValueError:  # an axis of zero rows beside others whose product overflows NumPy's index type
        raise TensorError("shape", f"shape {shape} is too large") from None
