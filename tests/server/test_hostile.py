"""Clients that break the protocol, claim too much, flood, or do not read: they are refused, and others are served."""

from __future__ import annotations

import gzip
import socket
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import grpc
import h2.exceptions
import numpy as np
import pytest

from http2 import CLOSED, RESET, Connection, frame
from serving import running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb

ENCODE, LIST_MODELS = "/vaeserve.v1.VaeService/Encode", "/vaeserve.v1.VaeService/ListModels"
INTERNAL, EXHAUSTED, UNIMPLEMENTED, INVALID, DEADLINE = (
    str(code.value[0])
    for code in (
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
)
gzipped = partial(gzip.compress, mtime=0)  # the same bytes in every process: they are names of tests too
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@pytest.fixture(scope="module")
def target(several_models: Path) -> Iterator[str]:
    with running_server(several_models, max_message_bytes=2**20) as server:
        yield server.target


@pytest.fixture(autouse=True)
def others_are_served(target: str) -> Iterator[None]:
    """After each of these, and with its connections still open, somebody else gets an answer."""
    yield
    with Connection(target) as other:
        assert other.call(LIST_MODELS, frame(b"")) == "0"


@pytest.mark.parametrize(
    ("body", "headers", "outcomes"),
    [
        (frame(gzipped(bytes(2**24)), 1), {"grpc_encoding": "gzip"}, {EXHAUSTED}),
        (frame(gzipped(b""), 1), {}, {INTERNAL, "0"}),  # grpcio does not tell that no encoding was named
        (frame(b"not gzip", 1), {"grpc_encoding": "gzip"}, {INVALID}),
        (frame(gzipped(b"cut off")[:-9], 1), {"grpc_encoding": "gzip"}, {INVALID}),
        (frame(zlib.compress(b""), 1), {"grpc_encoding": "deflate"}, {UNIMPLEMENTED}),
        (frame(b"x", 1), {"grpc_encoding": "br"}, {INTERNAL, UNIMPLEMENTED}),
        (frame(b"\xff\xff"), {}, {INVALID}),
        (frame(b""), {"grpc_timeout": "5X"}, {INTERNAL}),
        (frame(b""), {"grpc_timeout": "0n"}, {DEADLINE}),
    ],
)
def test_bad_calls_are_refused_with_a_status(
    target: str, body: bytes, headers: dict[str, str], outcomes: set[str]
) -> None:
    with Connection(target) as connection:
        assert connection.call(LIST_MODELS, body, **headers) in outcomes
        assert connection.call(LIST_MODELS, frame(b"")) == "0"


@pytest.mark.parametrize(
    "path",
    [
        "/vaeserve.v1.VaeService/Train",
        "/other.Service/Encode",
        "/",
        "/%FF",
        "/%ED%A0%80",
        "/grpc.%FF",
        "/vaeserve.v1.VaeService/%4cistModels",
        f"{LIST_MODELS}?a=b",
    ],
)
def test_unknown_methods_are_unimplemented(target: str, path: str) -> None:
    with Connection(target) as connection:
        assert connection.call(path, frame(b"")) == UNIMPLEMENTED


@pytest.mark.parametrize(
    "content_type", ["application/grpc+proto", "application/grpc+json", "application/grpc;charset=utf-8"]
)
def test_what_the_content_type_says_of_messages_does_not_matter(target: str, content_type: str) -> None:
    with Connection(target) as connection:
        assert connection.call(LIST_MODELS, frame(b""), content_type=content_type) == "0"


@pytest.mark.parametrize("body", [b"", gzipped(b"")])
def test_an_empty_message_may_be_marked_as_compressed(target: str, body: bytes) -> None:
    with Connection(target) as connection:
        assert connection.call(LIST_MODELS, frame(body, 1), grpc_encoding="gzip") == "0"


@pytest.mark.parametrize("rows", [1, 100])
def test_compressed_requests_are_taken(target: str, rows: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (rows, 1, 28, 28), np.uint8)
    request = pb.EncodeRequest(model=pb.ModelRef(name="mnist"), images=tensors.to_tensor(images)).SerializeToString()
    with Connection(target) as connection:
        stream = connection.open(ENCODE, grpc_encoding="gzip")
        connection.send_all(stream, frame(gzipped(request), 1))
        assert connection.outcome(stream) == "0"
        assert connection.headers[stream]["grpc-accept-encoding"] == "identity, gzip"


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param(bytes(range(256)) * 4, id="garbage"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n", id="HTTP 1"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), id="TLS to a plain port"),
        pytest.param(PREFACE + b"\xff\xff\xff\0\0\0\0\0\1", id="a frame of 16 MiB"),
        pytest.param(PREFACE + b"\0\0\4\1\5\0\0\0\1\xff\xff\xff\xff", id="bad header compression"),
    ],
)
def test_what_is_no_http2_is_hung_up_on(target: str, opening: bytes) -> None:
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port)), 20) as stranger:
        stranger.sendall(opening)
        with suppress(ConnectionError):
            while stranger.recv(65536):
                pass


@pytest.mark.parametrize(
    "body", [b"", b"\0\0", frame(b"short", length=300), frame(b"", length=2**32 - 1), frame(b"x", length=2**20 + 1)]
)
@pytest.mark.parametrize("end", [True, False])
def test_messages_that_do_not_come_in_full_are_never_answered_ok(target: str, body: bytes, end: bool) -> None:
    with Connection(target) as connection:
        stream = connection.open(LIST_MODELS)
        connection.send(stream, body, end=end)
        assert connection.call(LIST_MODELS, frame(b"")) == "0"
        # grpcio leaves such a call without an answer.
        assert connection.headers.get(stream, {}).get("grpc-status", INTERNAL) in {INTERNAL, EXHAUSTED}


def test_calls_opened_and_reset_at_once_do_no_harm(target: str) -> None:
    with Connection(target) as connection, suppress(ConnectionError, h2.exceptions.ProtocolError):
        for _ in range(3000):
            stream = connection.open(ENCODE)
            connection.http.reset_stream(stream)
            connection.flush()


def test_a_flood_of_pings_does_no_harm(target: str) -> None:
    with Connection(target) as connection, suppress(ConnectionError):
        for number in range(20_000):
            connection.http.ping(number.to_bytes(8, "big"))
            connection.flush()


def test_hundreds_of_idle_connections_do_no_harm(target: str) -> None:
    host, _, port = target.rpartition(":")
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection((host, int(port)), 20))
        with Connection(target) as other:
            assert other.call(LIST_MODELS, frame(b"")) == "0"


def test_clients_that_do_not_read_hold_up_nobody(target: str, several_models: Path) -> None:
    request = pb.SampleRequest(model=pb.ModelRef(name="mnist"), count=100).SerializeToString()
    with ExitStack() as stack:
        for _ in range(20):
            deaf = stack.enter_context(Connection(target))
            for _ in range(20):
                deaf.send(deaf.open("/vaeserve.v1.VaeService/Sample"), frame(request))
        with Connection(target) as other:
            assert other.call(LIST_MODELS, frame(b"")) == "0"


def test_large_metadata_is_taken_or_refused(target: str) -> None:
    with Connection(target) as connection:
        outcome = connection.call(LIST_MODELS, frame(b""), **{f"key_{i}": "v" * 100 for i in range(50)})
        assert outcome == "0"
    with Connection(target) as connection:
        outcome = connection.call(LIST_MODELS, frame(b""), **{f"key_{i}": "v" * 10_000 for i in range(20)})
        assert outcome in {"0", EXHAUSTED, RESET, CLOSED}


def test_random_bytes_for_every_method_are_refused(target: str) -> None:
    random = np.random.default_rng(int.from_bytes(b"seed"))
    with grpc.insecure_channel(target) as channel, ThreadPoolExecutor(8) as pool:
        methods = ["Encode", "Decode", "Sample", "GetModel", "ListModels"]

        def send(number: int) -> grpc.StatusCode:
            name = methods[number % len(methods)]
            call = channel.unary_unary(f"/vaeserve.v1.VaeService/{name}")
            try:
                call(random.bytes(int(random.integers(1, 200))), timeout=20)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        codes = set(pool.map(send, range(500)))
    assert codes <= {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
