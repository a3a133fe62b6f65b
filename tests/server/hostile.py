"""Hostile requests for any gRPC service: well-formed ones by a walk over the descriptors, malformed ones by mutation.

Nothing here knows a service. Good requests are the examples that the walk starts from, or it would hardly ever get past
the first check.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from vaeserve_server.protobuf_wire import varint

_MAX_DEPTH = 6
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_EDGES = [
    0,
    1,
    2,
    3,
    4,
    28,
    100,
    101,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63 - 1,
    2**64 - 1,
    -1,
    -(2**31),
]
_TEXTS = [
    "",
    "mnist",
    "faces",
    "1",
    "2",
    "9",
    "02",
    "-1",
    "1" * 64,
    "d" * 64,
    "../..",
    "mnist/1",
    "\0",
    "a" * 70_000,
    "mnist-encoder",
    "FP16",
    "count",
]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan"), 1e308]
_SIZES = [0, 1, 15, 16, 63, 64, 65, 784, 3136, 65536, 300_000]


@st.composite
def messages(draw: st.DrawFn, examples: Sequence[Message], depth: int = 0) -> Message:
    """Return a request with fields that nobody would send, in good company or none.

    `examples` are of one message type; some of their fields are dropped or replaced.
    """
    example = draw(st.sampled_from(examples))
    message = type(example)()
    if draw(st.integers(0, 9)):
        message.CopyFrom(example)
    changes = 1 + draw(st.integers(0, 2))
    fields = list(message.DESCRIPTOR.fields)
    for field in draw(st.lists(st.sampled_from(fields), max_size=changes)) if fields else []:
        if draw(st.integers(0, 4)):
            _replace(draw, message, field, depth)
        else:
            message.ClearField(field.name)
    return message


def _replace(draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int) -> None:
    name = field.name
    if _is_map(field):
        _fill_map(draw, message, field, depth)
    elif field.is_repeated:
        kept = list(getattr(message, name))
        values = draw(st.lists(_value(field, kept, depth), max_size=6)) * draw(st.sampled_from([1, 1, 1, 1, 20]))
        if kept and draw(st.booleans()):  # beside good ones
            values = [*kept, *values][: 1 + draw(st.integers(0, 8))]
        message.ClearField(name)
        getattr(message, name).extend(values)
    elif field.message_type is not None:
        getattr(message, name).CopyFrom(draw(_value(field, [getattr(message, name)], depth)))
        getattr(message, name).SetInParent()
    else:
        setattr(message, name, draw(_value(field, [getattr(message, name)], depth)))


def _fill_map(draw: st.DrawFn, message: Message, field: FieldDescriptor, depth: int) -> None:
    entry = field.message_type.fields_by_name
    entries = getattr(message, field.name)
    for key in draw(st.lists(_value(entry["key"], [], depth), max_size=3)):
        if entry["value"].message_type is None:
            entries[key] = draw(_value(entry["value"], [], depth))
        else:
            entries[key].CopyFrom(draw(_value(entry["value"], [], depth)))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _value(field: FieldDescriptor, kept: Sequence[Any], depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        examples = list(kept) or [message_factory.GetMessageClass(field.message_type)()]
        return messages(examples, depth + 1) if depth < _MAX_DEPTH else st.sampled_from(examples)
    return _bytes(kept) if field.type == FieldDescriptor.TYPE_BYTES else _scalar(field)


@functools.cache
def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values]) | st.integers(-(2**31), 2**31 - 1)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.sampled_from(_TEXTS) | st.text(max_size=12)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if field.cpp_type in _RANGES:
        low, high = _RANGES[field.cpp_type]
        return st.sampled_from([edge for edge in _EDGES if low <= edge <= high]) | st.integers(low, high)
    return st.sampled_from(_FLOATS) | st.floats(width=32 if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT else 64)


def _bytes(kept: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Return the bytes that were there, damaged; of a size that fits something, with values of every kind; any."""
    fills = [b"\0", b"\x3f", b"\x7f\xc0\0\0", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff", b"\0\x7c", b"\x99\x76\x96\x7e"]
    filled = st.builds(lambda fill, size: (fill * size)[:size], st.sampled_from(fills), st.sampled_from(_SIZES))
    damaged = st.builds(lambda data, seed: mutated(data, random.Random(seed)), st.sampled_from([*kept, b""]), _SEEDS)
    return filled | damaged | st.binary(max_size=24)


_SEEDS = st.integers(0, 2**32 - 1)
Mutation = Callable[[bytearray, random.Random], None]


def mutated(data: bytes, source: random.Random) -> bytes:
    """Return `data` with one to four accidents: flipped, lost, doubled or moved bytes, and lengths that lie."""
    work = bytearray(data)
    for _ in range(source.choice([1, 1, 1, 2, 4])):
        source.choice(_MUTATIONS)(work, source)
    return bytes(work)


def _place(work: bytearray, source: random.Random) -> int:
    # Most of a request is pixels: half of the accidents happen among the first bytes, where tags and lengths are.
    return source.randrange(min(len(work), 40) if source.random() < 0.5 else len(work)) if work else 0


def _flip(work: bytearray, source: random.Random) -> None:
    if work:
        work[_place(work, source)] ^= 1 << source.randrange(8)


def _set(work: bytearray, source: random.Random) -> None:
    if work:
        work[_place(work, source)] = source.choice([0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)])


def _insert(work: bytearray, source: random.Random) -> None:
    at = _place(work, source)
    work[at:at] = source.randbytes(source.choice([1, 1, 2, 8]))


def _lose(work: bytearray, source: random.Random) -> None:
    at = _place(work, source)
    del work[at : at + source.choice([1, 1, 4, 100])]


def _truncate(work: bytearray, source: random.Random) -> None:
    del work[_place(work, source) :]


def _double(work: bytearray, source: random.Random) -> None:
    at = _place(work, source)
    work[at:at] = work[at : at + source.randint(1, 32)]


def _lie(work: bytearray, source: random.Random) -> None:
    """Put in a field whose length or number is absurd."""
    at = _place(work, source)
    tag = (source.choice([1, 2, 3, 4, 5, 15, 2**29 - 1, 0]) << 3) | source.randrange(8)
    work[at:at] = varint(tag) + varint(source.choice([0, 2**31 - 1, 2**32, 2**63, 2**64 - 1]))


def _nest(work: bytearray, source: random.Random) -> None:
    """Wrap what is there into messages in messages, or groups in groups."""
    for _ in range(source.choice([1, 3, 150])):
        if source.random() < 0.5:
            work[0:0] = varint(source.choice([0x0A, 0x12])) + varint(len(work))
        else:
            work[0:0] = b"\x0b"


def _pretend(work: bytearray, _source: random.Random) -> None:
    """Look like gzip data."""
    work[0:0] = b"\x1f\x8b\x08\0\0\0\0\0\0\x03"


_MUTATIONS: list[Mutation] = [_flip] * 4 + [_set] * 4 + [_insert, _lose, _truncate, _double, _lie, _nest, _pretend]
