"""Finding what an ONNX file may not have, before ONNX Runtime reads a byte of it.

A bundle's digests cover its files, so a graph whose weights lie in another file (or at an address in memory, which ONNX
Runtime spells as a file name) would run unverified data. A graph is data, too, and ONNX's own operators are all that it
may ask for: one of another domain is code that somebody registered, some of which opens files by itself. And a sparse
tensor of a few bytes may claim terabytes. No exporter here makes any of these.

The server does not install `onnx`; this walks the protobuf wire format down the few fields of onnx.proto that matter.
"""

from __future__ import annotations

from collections.abc import Iterator

from vaeserve_server.errors import shown
from vaeserve_server.protobuf_wire import FIXED_BYTES, LENGTH, VARINT, WireError, read_varint

# Message -> field number -> message it holds. Field numbers are onnx.proto's.
_CHILDREN = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {},
    "Tensor": {},
}
_WHOLE = {
    "Function": "it defines operators of its own; inline them",
    "SparseTensor": "it has a sparse tensor, whose size its file does not bound; make it dense",
}
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 8, 13, 14
_NODE_OPERATOR, _NODE_DOMAIN = 4, 7
_OWN_DOMAINS = {"", "ai.onnx"}
_MAX_DEPTH = 64


def problem(graph: bytes) -> str | None:
    """Return what `graph`, a serialised ModelProto, has that it may not have; None if there is nothing.

    ValueError if the bytes are not the wire format, or nest deeper than any honest graph.
    """
    try:
        return _search(memoryview(graph), "Model", 0)
    except IndexError:
        raise ValueError("it is cut short") from None
    except WireError:
        raise ValueError("it is no ONNX file") from None


def _search(message: memoryview, kind: str, depth: int) -> str | None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"it nests deeper than {_MAX_DEPTH} messages")
    if kind in _WHOLE:
        return _WHOLE[kind]
    if kind == "Tensor":
        return _tensor_problem(message)
    if kind == "Node" and (found := _operator_problem(message)) is not None:
        return found
    children = _CHILDREN[kind]
    for field, value in _fields(message):
        if field in children and isinstance(value, memoryview):
            found = _search(value, children[field], depth + 1)
            if found is not None:
                return found
    return None


def _tensor_problem(message: memoryview) -> str | None:
    name, outside = "", False
    for field, value in _fields(message):
        if field == _TENSOR_NAME and isinstance(value, memoryview):
            name = _text(value)
        elif field == _TENSOR_EXTERNAL_DATA or (field == _TENSOR_DATA_LOCATION and value != 0):
            outside = True
    if not outside:
        return None
    return f"tensor {shown(name) if name else '(unnamed)'} is kept outside the file, where no digest covers it"


def _operator_problem(message: memoryview) -> str | None:
    texts = {_NODE_OPERATOR: "", _NODE_DOMAIN: ""}
    for field, value in _fields(message):
        if field in texts and isinstance(value, memoryview):
            texts[field] = _text(value)
    if texts[_NODE_DOMAIN] in _OWN_DOMAINS:
        return None
    asked = f"operator {shown(texts[_NODE_OPERATOR])} of domain {shown(texts[_NODE_DOMAIN])}"
    return f"it asks for {asked}; a graph may use ONNX's own operators only"


def _text(value: memoryview) -> str:
    return bytes(value[:200]).decode(errors="replace")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, varint or bytes) of each field of one message; fixed-width fields are passed over."""
    position = 0
    while position < len(message):
        key, position = read_varint(message, position)
        wire_type = key & 7
        if wire_type == VARINT:
            value, position = read_varint(message, position)
            yield key >> 3, value
        elif wire_type == LENGTH:
            length, position = read_varint(message, position)
            if length > len(message) - position:
                raise ValueError("it is cut short")
            yield key >> 3, message[position : position + length]
            position += length
        elif wire_type in FIXED_BYTES:
            position += FIXED_BYTES[wire_type]
        else:
            raise WireError
