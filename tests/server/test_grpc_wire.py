"""gRPC's wire format by itself: whatever comes in, in whatever pieces, is cut rightly or refused."""

from __future__ import annotations

import gzip
import itertools
import math
from functools import partial

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.rpc import code_pb2
from hypothesis import given
from hypothesis import strategies as st

from vaeserve_server import grpc_wire

gzipped = partial(gzip.compress, mtime=0)  # the same bytes in every process: they are names of tests too
LIMIT = 1000
messages = st.lists(st.binary(max_size=50), max_size=5)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


@given(messages, st.lists(st.integers(0, 300), max_size=8))
def test_messages_come_out_however_the_network_cut_them(sent: list[bytes], cuts: list[int]) -> None:
    deframer = grpc_wire.Deframer(LIMIT)
    data = b"".join(grpc_wire.frame(message) for message in sent)
    frames = [frame for piece in pieces(data, cuts) for frame in deframer.feed(piece)]
    deframer.finish()
    assert frames == [grpc_wire.Frame(compressed=False, data=message) for message in sent]


@given(messages.filter(len), st.integers(1, 54))
def test_a_request_that_ends_inside_a_message_is_refused(sent: list[bytes], missing: int) -> None:
    deframer = grpc_wire.Deframer(LIMIT)
    data = b"".join(grpc_wire.frame(message) for message in sent)
    deframer.feed(data[: -min(missing, len(sent[-1]) + 4)])
    with pytest.raises(grpc_wire.WireError, match="the request ended after") as raised:
        deframer.finish()
    assert raised.value.code == code_pb2.INTERNAL


@given(st.binary(max_size=50), st.binary(min_size=1, max_size=50), st.lists(st.integers(0, 100), max_size=4))
def test_nothing_may_come_after_a_sole_message(message: bytes, more: bytes, cuts: list[int]) -> None:
    deframer = grpc_wire.Deframer(LIMIT, sole=True)
    with pytest.raises(grpc_wire.WireError, match="more than one message") as raised:
        for piece in pieces(grpc_wire.frame(message) + more, cuts):
            assert deframer.feed(piece) in ([], [grpc_wire.Frame(compressed=False, data=message)])
    assert raised.value.code == code_pb2.INTERNAL


def test_a_megabyte_of_empty_messages_is_cut_at_once() -> None:
    # To copy what is left after each would take seconds, on the event loop.
    assert len(grpc_wire.Deframer(LIMIT).feed(bytes(2**20))) == 2**20 // 5


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_cut_or_refused(data: bytes) -> None:
    deframer = grpc_wire.Deframer(LIMIT)
    try:
        taken = sum(5 + len(frame.data) for frame in deframer.feed(data))
        deframer.finish()
    except grpc_wire.WireError as error:
        assert error.code in {code_pb2.INTERNAL, code_pb2.RESOURCE_EXHAUSTED}
    else:
        assert taken == len(data)


def test_a_giant_claim_is_refused_at_its_prefix() -> None:
    with pytest.raises(grpc_wire.WireError, match=r"larger than max \(4294967295 vs. 1000\)") as raised:
        grpc_wire.Deframer(LIMIT).feed(b"\0\xff\xff\xff\xff")
    assert raised.value.code == code_pb2.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1])
def test_the_limit_itself_is_taken(length: int) -> None:
    data = grpc_wire.frame(b"x" * length)
    if length <= LIMIT:
        assert len(grpc_wire.Deframer(LIMIT).feed(data)) == 1
    else:
        with pytest.raises(grpc_wire.WireError):
            grpc_wire.Deframer(LIMIT).feed(data)


@given(st.binary(max_size=LIMIT))
def test_what_gzip_packed_is_unpacked(message: bytes) -> None:
    assert grpc_wire.gunzip(gzipped(message), LIMIT) == message


@given(st.binary(max_size=8))
def test_no_message_looks_like_gzip(rest: bytes) -> None:
    with pytest.raises(DecodeError):
        Empty.FromString(b"\x1f\x8b" + rest)


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (gzipped(bytes(10**6)), code_pb2.RESOURCE_EXHAUSTED, "more than 1000 uncompressed"),
        (b"not gzip", code_pb2.INVALID_ARGUMENT, "a message is not gzip data"),
        (gzipped(b"cut off")[:-9], code_pb2.INVALID_ARGUMENT, "ends too early"),
    ],
)
def test_what_cannot_be_unpacked_is_refused(data: bytes, code: int, message: str) -> None:
    with pytest.raises(grpc_wire.WireError, match=message) as raised:
        grpc_wire.gunzip(data, LIMIT)
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"3S", 3.0),
        (b"250m", 0.25),
        (b"7u", 7e-6),
        (b"99999999n", 0.099999999),
        (b"0n", 0.0),
    ],
)
def test_timeouts_are_in_seconds(value: bytes, seconds: float) -> None:
    assert math.isclose(grpc_wire.timeout_s(value), seconds)


@pytest.mark.parametrize("value", [b"", b"S", b"5", b"5X", b"-5S", b"5.0S", b"123456789S", "5²S".encode()])
def test_what_is_no_timeout_is_refused(value: bytes) -> None:
    with pytest.raises(grpc_wire.WireError, match="grpc-timeout"):
        grpc_wire.timeout_s(value)


@given(st.text())
def test_any_message_is_told_in_printable_ascii(message: str) -> None:
    told = dict(grpc_wire.status_headers(3, message, ())).get(b"grpc-message", b"")
    assert all(0x20 <= byte <= 0x7E for byte in told)
    assert grpc.StatusCode.INVALID_ARGUMENT.value[0] == int(
        dict(grpc_wire.status_headers(3, message, ()))[b"grpc-status"]
    )


def test_metadata_is_base64_exactly_where_the_key_says_so() -> None:
    headers = grpc_wire.status_headers(8, "full: 100 %", [("grpc-retry-pushback-ms", "20"), ("details-bin", b"\0\1")])
    assert headers == [
        (b"grpc-status", b"8"),
        (b"grpc-message", b"full: 100 %25"),
        (b"grpc-retry-pushback-ms", b"20"),
        (b"details-bin", b"AAE"),
    ]


@pytest.mark.parametrize("encoding", [b"identity", b"gzip"])
def test_known_encodings_are_taken(encoding: bytes) -> None:
    grpc_wire.check_encoding(encoding)


def test_another_encoding_is_unimplemented() -> None:
    with pytest.raises(grpc_wire.WireError, match="grpc-encoding br is not taken; use identity, gzip") as raised:
        grpc_wire.check_encoding(b"br")
    assert raised.value.code == code_pb2.UNIMPLEMENTED


@given(prefix=st.binary(min_size=0, max_size=5), message=st.binary(max_size=40), framed=st.booleans())
def test_the_short_way_takes_what_the_deframer_would_and_nothing_else(
    prefix: bytes, message: bytes, framed: bool
) -> None:
    request = grpc_wire.frame(message) if framed else prefix + message
    deframer = grpc_wire.Deframer(max_message_bytes=32)
    try:
        frames = deframer.feed(request)
        deframer.finish()
    except grpc_wire.WireError:
        frames = []
    sole = frames[0].data if len(frames) == 1 and not frames[0].compressed else None
    assert grpc_wire.sole_message(request, 32) == sole
