"""Finding tensors that an ONNX file keeps outside itself, before ONNX Runtime reads a byte of it.

A bundle's digests cover its files, so a graph whose weights lie in another file (or at an address in memory, which ONNX
Runtime spells as a file name) would run unverified data. The server does not install `onnx`; this walks the protobuf
wire format (protobuf.dev/programming-guides/encoding) down the few fields of onnx.proto that lead to a TensorProto.
"""

from __future__ import annotations

from collections.abc import Iterator

# Message -> field number -> message it holds. Field numbers are onnx.proto's.
_CHILDREN = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 8, 13, 14
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 64


def external_tensor(graph: bytes) -> str | None:
    """Return the name of a tensor whose data is outside `graph`, a serialised ModelProto; None if there is none.

    ValueError if the bytes are not the wire format, or nest deeper than any honest graph.
    """
    try:
        return _search(memoryview(graph), "Model", 0)
    except IndexError:
        raise ValueError("it is cut short") from None


def _search(message: memoryview, kind: str, depth: int) -> str | None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"it nests deeper than {_MAX_DEPTH} messages")
    children = _CHILDREN[kind]
    name, outside = "", False
    for field, value in _fields(message):
        if isinstance(value, memoryview):
            if kind == "Tensor" and field == _TENSOR_NAME:
                name = bytes(value[:64]).decode(errors="replace")
            elif kind == "Tensor" and field == _TENSOR_EXTERNAL_DATA:
                outside = True
            elif field in children and (found := _search(value, children[field], depth + 1)) is not None:
                return found
        elif kind == "Tensor" and field == _TENSOR_DATA_LOCATION and value != 0:
            outside = True
    return (name or "(unnamed)") if outside else None


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, varint or bytes) of each field of one message; fixed-width fields are passed over."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value
        elif wire_type == _LENGTH:
            length, position = _varint(message, position)
            if length > len(message) - position:
                raise ValueError("it is cut short")
            yield key >> 3, message[position : position + length]
            position += length
        elif wire_type in {_FIXED64, _FIXED32}:
            position += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError("it is no ONNX file")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift >= 70:  # ten bytes hold 64 bits
            raise ValueError("it is no ONNX file")
