"""Protobuf's wire format (protobuf.dev/programming-guides/encoding), to look at messages before they are parsed."""

from __future__ import annotations

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}

_LONGEST = 10  # bytes of 7 bits hold 64


class WireError(ValueError):
    """The bytes are not protobuf's wire format."""


def read_varint(message: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return the number at `position`, and where it ends.

    IndexError if the message ends first, WireError if the number does not end.
    """
    value = 0
    for count in range(_LONGEST):
        byte = message[position + count]
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, position + count + 1
    raise WireError("a number has no end")


def varint(value: int) -> bytes:
    """Return `value` >= 0 as it stands on the wire."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
