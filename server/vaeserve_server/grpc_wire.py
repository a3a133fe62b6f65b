"""gRPC's wire format over HTTP/2: frames, timeouts, status and metadata, with no transport and no waiting.

The rules are those of gRPC's PROTOCOL-HTTP2 document. grpcio has them inside its core; a transport that gets plain
HTTP/2 streams has them from here.
"""

from __future__ import annotations

import asyncio
import base64
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote

from google.rpc import code_pb2

Headers = list[tuple[bytes, bytes]]

_PREFIX = struct.Struct(">BI")  # compressed or not, length of the message
_PREFIX_BYTES = _PREFIX.size
_TIMEOUT_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_TIMEOUT_DIGITS = 8
_GZIP_FORMAT = 16 + zlib.MAX_WBITS  # as zlib's wbits
_GZIP_MAGIC = b"\x1f\x8b"
_INLINE_DECOMPRESS_BYTES = 16384
_CONTENT_TYPE = b"application/grpc"
ACCEPTED_ENCODINGS = b"identity, gzip"
_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if c != ord("%"))


class WireError(Exception):
    """The caller broke the protocol, or a limit of it. `code` is google.rpc.Code's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Frame(NamedTuple):
    """One message as it was sent."""

    compressed: bool
    data: bytes


def sole_message(request: bytes, max_message_bytes: int) -> bytes | None:
    """Return the message of a request that is one whole uncompressed frame, as nearly all are; None for any other."""
    length = len(request) - _PREFIX_BYTES
    if 0 <= length <= max_message_bytes and request[:_PREFIX_BYTES] == _PREFIX.pack(0, length):
        return request[_PREFIX_BYTES:]
    return None


class Deframer:
    """Cuts a request's bytes into messages, however the network cut them. After a `sole` one nothing more may come."""

    def __init__(self, max_message_bytes: int, *, sole: bool = False) -> None:
        self._max_message_bytes = max_message_bytes
        self._sole = sole
        self._had_one = False
        self._chunks: list[bytes] = []
        self._bytes = 0
        self._needed = _PREFIX_BYTES

    def feed(self, chunk: bytes) -> list[Frame]:
        """Return the messages that `chunk` completes; WireError as soon as one claims to be too long."""
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        frames: list[Frame] = []
        if self._bytes >= self._needed:
            buffered = b"".join(self._chunks) if len(self._chunks) > 1 else chunk
            # A megabyte may hold 200 000 empty messages: what is left is copied once, and not after each of them.
            rest = buffered[self._cut(buffered, frames) :]
            self._chunks, self._bytes = [rest], len(rest)
        if self._sole and self._bytes and self._had_one:
            raise WireError(code_pb2.INTERNAL, "the request has more than one message; the method takes one")
        return frames

    def _cut(self, buffered: bytes, frames: list[Frame]) -> int:
        """Add the messages that `buffered` begins with to `frames`, of a sole one it alone; return where they end."""
        position = 0
        while len(buffered) - position >= self._needed and not (self._sole and self._had_one):
            compressed, length = _PREFIX.unpack_from(buffered, position)
            self._check(compressed, length)
            self._needed = _PREFIX_BYTES + length
            if len(buffered) - position >= self._needed:
                frames.append(Frame(bool(compressed), buffered[position + _PREFIX_BYTES : position + self._needed]))
                position += self._needed
                self._needed = _PREFIX_BYTES
                self._had_one = True
        return position

    def finish(self) -> None:
        """Check that the request did not end inside a message."""
        if self._bytes:
            raise WireError(
                code_pb2.INTERNAL, f"the request ended after {self._bytes} of the {self._needed} bytes of a message"
            )

    def _check(self, compressed: int, length: int) -> None:
        if compressed > 1:
            raise WireError(
                code_pb2.INTERNAL, f"a message's first byte is {compressed}; it says compressed (1) or not (0)"
            )
        if length > self._max_message_bytes:
            raise too_large(length, self._max_message_bytes)


def too_large(given_bytes: int, max_message_bytes: int) -> WireError:
    """Return the refusal of a message over the limit."""
    return WireError(
        code_pb2.RESOURCE_EXHAUSTED, f"Received message larger than max ({given_bytes} vs. {max_message_bytes})"
    )


def frame(message: bytes) -> bytes:
    """Return one uncompressed message with its prefix."""
    return _PREFIX.pack(0, len(message)) + message


def is_grpc(content_type: bytes) -> bool:
    """Return whether a `content-type` is gRPC's, whatever it says of messages, as grpcio has it; gRPC-Web's is not."""
    return content_type == _CONTENT_TYPE or content_type.startswith((_CONTENT_TYPE + b"+", _CONTENT_TYPE + b";"))


def check_encoding(encoding: bytes) -> None:
    """Raise WireError for a `grpc-encoding` that this server cannot undo."""
    if encoding not in {b"identity", b"gzip"}:
        raise WireError(
            code_pb2.UNIMPLEMENTED,
            f"grpc-encoding {encoding.decode('ascii', 'replace')} is not taken; use {ACCEPTED_ENCODINGS.decode()}",
        )


def is_gzip(data: bytes) -> bool:
    """Return whether a message is gzip data: no protobuf message begins so, 0x1f would be of wire type 7."""
    return data[:2] == _GZIP_MAGIC


async def content(data: bytes, max_message_bytes: int) -> bytes:
    """Return the message that `data` is or has as gzip, where nobody says which; WireError as of `gunzip`."""
    return await unpacked(data, max_message_bytes) if is_gzip(data) else data


async def unpacked(data: bytes, max_message_bytes: int) -> bytes:
    """Return what `gunzip` does; what takes its time takes it in a thread."""
    if len(data) <= _INLINE_DECOMPRESS_BYTES:
        return gunzip(data, max_message_bytes)
    return await asyncio.to_thread(gunzip, data, max_message_bytes)


def gunzip(data: bytes, max_message_bytes: int) -> bytes:
    """Return the message, never more than the limit of it whatever `data` says; WireError if it cannot be had."""
    stream = zlib.decompressobj(_GZIP_FORMAT)
    try:
        message = stream.decompress(data, max_message_bytes + 1)
    except zlib.error:
        raise WireError(code_pb2.INVALID_ARGUMENT, "a message is not gzip data, as its call says") from None
    if len(message) > max_message_bytes:
        del message  # the traceback would keep it for as long as the error is told
        raise WireError(
            code_pb2.RESOURCE_EXHAUSTED,
            f"Received message larger than max (more than {max_message_bytes} uncompressed)",
        )
    if not stream.eof:
        raise WireError(code_pb2.INVALID_ARGUMENT, "a message's gzip data ends too early")
    return message


def timeout_s(value: bytes) -> float:
    """Return a `grpc-timeout` in seconds; WireError if it is none."""
    number, unit = value[:-1], value[-1:]
    if unit not in _TIMEOUT_UNITS or not number.isdigit() or len(number) > _TIMEOUT_DIGITS:
        raise WireError(
            code_pb2.INTERNAL, "grpc-timeout is not a number of at most 8 digits and one of H, M, S, m, u, n"
        )
    return int(number) * _TIMEOUT_UNITS[unit]


def status_headers(code: int, message: str, metadata: Iterable[tuple[str, str | bytes]]) -> Headers:
    """Return status and metadata as they stand in trailers."""
    headers: Headers = [(b"grpc-status", b"%d" % code)]
    if message:
        headers.append((b"grpc-message", quote(message, safe=_PLAIN).encode("ascii")))
    for key, value in metadata:
        # Values of -bin keys are bytes, without padding; the others' are ASCII.
        encoded = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode("ascii")
        headers.append((key.encode("ascii"), encoded))
    return headers
