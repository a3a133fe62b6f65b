"""The few facts that the server wants to know of an X.509 certificate, read from its DER bytes (RFC 5280, section 4.1).

The standard library checks certificates and tells nobody when they expire or what kind of key they have, and a
dependency for these two would be the server's largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

_VERSION_TAG, _UTC_TIME_TAG, _OBJECT_ID_TAG = 0xA0, 0x17, 0x06
_LONG_FORM = 0x80
# DER of the object identifiers; by RFC 3279 and RFC 5480.
_RSA = bytes.fromhex("2a864886f70d010101")
_EC = bytes.fromhex("2a8648ce3d0201")
_CURVES = {
    bytes.fromhex("2a8648ce3d030107"): "P-256",
    bytes.fromhex("2b81040022"): "P-384",
    bytes.fromhex("2b81040023"): "P-521",
}


class Facts(NamedTuple):
    """A certificate's number, when it is valid, and its key: "RSA", "ECDSA P-256", -384 or -521; "" for any other."""

    serial: int
    not_before: datetime
    not_after: datetime
    key: str


def read(der: bytes) -> Facts:
    """Return the facts of one certificate; ValueError if `der` is none."""
    try:
        return _read(der)
    except (IndexError, UnicodeDecodeError):
        raise ValueError("it is no X.509 certificate") from None


def _read(der: bytes) -> Facts:
    ((_, certificate), *_) = _items(der)
    ((_, to_be_signed), *_) = _items(certificate)
    fields = [item for item in _items(to_be_signed) if item[0] != _VERSION_TAG]
    (_, serial), _signature, _issuer, (_, validity), _subject, (_, public_key) = fields[:6]
    not_before, not_after = (_time(tag, value) for tag, value in _items(validity))
    ((_, algorithm), *_) = _items(public_key)
    identifiers = [value for tag, value in _items(algorithm) if tag == _OBJECT_ID_TAG]
    return Facts(int.from_bytes(serial), not_before, not_after, _key(identifiers))


def _key(identifiers: list[bytes]) -> str:
    if identifiers[0] == _RSA:
        return "RSA"
    curve = _CURVES.get(identifiers[-1])
    return f"ECDSA {curve}" if identifiers[0] == _EC and curve else ""


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each element."""
    position = 0
    while position < len(data):
        tag, length = data[position], data[position + 1]
        position += 2
        if length >= _LONG_FORM:
            size = length - _LONG_FORM
            length = int.from_bytes(data[position : position + size])
            position += size
        yield tag, data[position : position + length]
        position += length


def _time(tag: int, value: bytes) -> datetime:
    text = value.decode("ascii")
    if tag == _UTC_TIME_TAG:  # two digits of the year: 50 to 99 are 1950 to 1999
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
