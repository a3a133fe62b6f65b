"""Arrays <-> the tensors of the Open Inference Protocol, raw or typed. The bytes are checked by the SDK's own codec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from vaeserve import tensors
from vaeserve_server.checks import Array
from vaeserve_server.errors import InvalidInputError, NotOfferedError, shown
from vaeserve_server.protobuf_wire import varint
from vaeserve_server.work import FLOAT16, FLOAT32, UINT8, DType

_INTEGERS = {"UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8"} | {
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
}
_DTYPES: dict[str, DType] = {
    name: np.dtype(code) for name, code in {**_INTEGERS, "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}.items()
}
_DATATYPES = {dtype: name for name, dtype in _DTYPES.items()}
# Where typed contents have the elements of each datatype. FP16 has no such place.
_TYPED = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
IMAGE_DTYPES: dict[str, DType] = {"FP32": FLOAT32, "UINT8": UINT8, "FP16": FLOAT16}
# What the native contract calls the same arrays, so what its errors speak of.
_NATIVE_NAMES = {"image": "images", "latent": "latents"}
_BYTES = 2  # the wire type of what has a length


def read(request: Any, required: Iterable[str], optional: Iterable[str]) -> dict[str, Array]:
    """Return the inputs of a ModelInferRequest by name, in views of the message; InvalidInputError if they cannot be.

    Datatypes and shapes are as they were sent: whether the model takes them is the engine's to say.
    """
    required, raw = list(required), request.raw_input_contents
    taken = [*required, *optional]
    if raw and len(raw) != len(request.inputs):
        raise InvalidInputError(
            "raw_input_contents",
            f"there are {len(raw)} raw_input_contents and {len(request.inputs)} inputs; send one for each input, or "
            "none and typed contents in the inputs",
        )
    arrays: dict[str, Array] = {}
    for position, tensor in enumerate(request.inputs):
        if tensor.name not in taken:
            raise InvalidInputError("inputs", f"input {shown(tensor.name)} is not one of {', '.join(taken)}")
        if tensor.name in arrays:
            raise InvalidInputError("inputs", f"input {tensor.name} is there twice")
        arrays[tensor.name] = _array(tensor, raw[position] if raw else None)
    for name in required:
        if name not in arrays:
            raise InvalidInputError(*_missing(name))
    return arrays


def _missing(name: str) -> tuple[str, str]:
    noun = _NATIVE_NAMES.get(name, name)
    return noun, f"{noun} {'are' if name in _NATIVE_NAMES else 'is'} missing"


def integer(name: str, array: Array) -> int:
    """Return the only element of an input."""
    if array.size != 1 or array.dtype.kind not in "iu":
        raise InvalidInputError(
            name, f"{name} is {array.dtype.name} of shape {array.shape}; send one integer, of shape (1,)"
        )
    return int(array.item())


def wanted(request: Any, offered: Iterable[str]) -> list[str]:
    """Return the names of the outputs that a ModelInferRequest asks for: all of them if it names none."""
    offered = list(offered)
    for output in request.outputs:
        if output.name not in offered:
            raise InvalidInputError("outputs", f"output {shown(output.name)} is not one of {', '.join(offered)}")
        if "classification" in output.parameters:
            raise NotOfferedError("classification is not offered; these outputs are no scores of classes")
        _refuse_shared_memory(output)
    return list(dict.fromkeys(output.name for output in request.outputs)) or offered


def write(response: Any, outputs: Mapping[str, Array], *, typed: bool) -> None:
    """Put `outputs` into a ModelInferResponse: as typed contents where they all can be and that is wanted, else raw."""
    typed = typed and all(_DATATYPES[array.dtype] in _TYPED for array in outputs.values())
    for name, array in outputs.items():
        datatype = _DATATYPES[array.dtype]
        tensor = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            tensor.contents.MergeFromString(_typed_contents(array, _TYPED[datatype]))
        else:
            response.raw_output_contents.append(array.tobytes())


def _array(tensor: Any, raw: bytes | None) -> Array:
    _refuse_shared_memory(tensor)
    noun = _NATIVE_NAMES.get(tensor.name, tensor.name)
    try:
        dtype = _dtype(tensor.datatype)
        return tensors.from_bytes(_bytes(tensor, raw), dtype, tuple(tensor.shape))
    except tensors.TensorError as error:
        raise InvalidInputError(f"{noun}.{error.field}", f"{noun}: {error}") from None


def _dtype(datatype: str) -> DType:
    if datatype not in _DTYPES:
        raise tensors.TensorError("datatype", f"datatype {shown(datatype)} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[datatype]


def _bytes(tensor: Any, raw: bytes | None) -> bytes:
    if raw is None:
        return _typed_bytes(tensor)
    if tensor.HasField("contents"):
        raise tensors.TensorError("contents", "contents are there twice, raw and typed; send one of them")
    return raw


def _typed_bytes(tensor: Any) -> bytes:
    """Return the elements of typed contents as raw contents have them."""
    contents, datatype = tensor.contents, tensor.datatype
    place = _TYPED.get(datatype)
    if place is None:
        raise tensors.TensorError("contents", f"{datatype} has no typed contents; send raw_input_contents")
    contents.DiscardUnknownFields()
    others = [field.name for field, _ in contents.ListFields() if field.name != place]
    if others:
        raise tensors.TensorError("contents", f"{datatype} is in {', '.join(others)}; it belongs into {place}")
    values = getattr(contents, place)
    dtype = _DTYPES[datatype]
    if dtype.kind == "f":
        # Packed, the only field, and last: many times faster than a list of numbers.
        message: bytes = contents.SerializeToString()
        return message[len(message) - len(values) * dtype.itemsize :]
    wide = np.array(values, np.uint64 if dtype.kind == "u" else np.int64)
    limits = np.iinfo(dtype)
    if wide.size and (wide.min() < limits.min or wide.max() > limits.max):
        raise tensors.TensorError("contents", f"{place} have a value outside {limits.min} to {limits.max}")
    return wide.astype(dtype).tobytes()


def _typed_contents(array: Array, place: str) -> bytes:
    """Return a serialised InferTensorContents. Written by hand: protobuf takes lists, a Python object an element."""
    if array.dtype.kind == "f":
        packed = array.tobytes()
    elif array.dtype == UINT8:
        # From 128 on a number takes two bytes: itself, whose highest bit says that there is more, and 1.
        flat = array.ravel()
        pairs = np.stack([flat, np.ones_like(flat)], axis=1)
        packed = pairs[np.stack([np.ones(flat.size, bool), flat > 0x7F], axis=1)].tobytes()
    else:
        packed = b"".join(varint(value) for value in array.ravel().tolist())
    number = pb.InferTensorContents.DESCRIPTOR.fields_by_name[place].number
    return varint(number << 3 | _BYTES) + varint(len(packed)) + packed


def _refuse_shared_memory(tensor: Any) -> None:
    if "shared_memory_region" in tensor.parameters:
        raise NotOfferedError("shared memory is not offered; send tensors with the request")
