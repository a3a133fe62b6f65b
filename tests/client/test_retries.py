"""Deadlines, retries and push-back: gRPC's own, by the service config that the client hands it."""

import asyncio
import contextlib
import queue
import socket
import threading
import time

import numpy as np
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from both_clients import both_clients
from faulty_server import IMAGE_SHAPE, FaultyService, faulty_server, refuse
from vaeserve import (
    AsyncClient,
    Cancelled,
    Client,
    ClientClosed,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)

IMAGES = np.zeros((2, *IMAGE_SHAPE), np.uint8)
UNAVAILABLE, EXHAUSTED, CANCELLED = StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED, StatusCode.CANCELLED
NOBODY = "127.0.0.1:1"


@pytest.fixture
def server():
    with faulty_server() as running:
        yield running


@contextlib.contextmanager
def silent_target():
    """Yield an address that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@both_clients
@pytest.mark.parametrize("code", [UNAVAILABLE, EXHAUSTED, CANCELLED])
def test_a_refused_call_is_tried_again(server, connect, code):
    server.service.faults = [lambda context: None, refuse(code), refuse(code)]
    with connect(server.target) as client:
        assert len(client.encode(IMAGES)) == 2
    assert len(server.service.calls("Encode")) == 3


@both_clients
def test_a_call_of_800_kilobytes_is_tried_again(connect):
    service = FaultyService(image_shape=(1, 400, 400))
    images = np.zeros((5, 1, 400, 400), np.uint8)
    with faulty_server(service) as server, connect(server.target, rows_per_call=5) as client:
        client.model()
        service.faults = [refuse(UNAVAILABLE), refuse(UNAVAILABLE)]
        assert len(client.encode(images)) == 5
    assert [call.rows for call in service.calls("Encode")] == [5, 5, 5]


@both_clients
def test_attempts_end_at_five(server, connect):
    with connect(server.target) as client:
        client.model()
        server.service.faults = [refuse(UNAVAILABLE, "draining")] * 9
        with pytest.raises(Unavailable, match=r"^draining$"):
            client.encode(IMAGES)
    assert len(server.service.calls("Encode")) == 5


@both_clients
def test_one_attempt_is_one_attempt(server, connect):
    with connect(server.target, max_attempts=1) as client:
        client.model()
        server.service.faults = [refuse(UNAVAILABLE)]
        with pytest.raises(Unavailable):
            client.encode(IMAGES)
    assert len(server.service.calls("Encode")) == 1


@both_clients
def test_push_back_of_minus_one_forbids_another_attempt(server, connect):
    with connect(server.target) as client:
        client.model()
        server.service.faults = [refuse(EXHAUSTED, "the queue will stay full", grpc_retry_pushback_ms="-1")]
        with pytest.raises(ResourceExhausted, match="the queue will stay full"):
            client.encode(IMAGES)
    assert len(server.service.calls("Encode")) == 1


@both_clients
def test_push_back_says_when_to_come_again(server, connect):
    with connect(server.target) as client:
        client.model()
        server.service.faults = [refuse(EXHAUSTED, grpc_retry_pushback_ms="700")]
        began = time.monotonic()
        client.encode(IMAGES)
    assert time.monotonic() - began >= 0.7  # the client's own first backoff is at most 0.12 s


@both_clients
@pytest.mark.parametrize("code", [StatusCode.INVALID_ARGUMENT, StatusCode.INTERNAL, StatusCode.NOT_FOUND])
def test_what_cannot_succeed_is_not_tried_again(server, connect, code):
    with connect(server.target) as client:
        client.model()
        server.service.faults = [refuse(code, "no")]
        with pytest.raises(Exception, match=r"^no$"):
            client.encode(IMAGES)
    assert len(server.service.calls("Encode")) == 1


@both_clients
def test_a_retry_asks_for_the_same_noise(server, connect):
    with connect(server.target) as client:
        client.model()
        server.service.faults = [refuse(UNAVAILABLE)]
        samples = client.sample(4)
    assert [call.seed for call in server.service.calls("Sample")] == [samples.seed] * 2


@both_clients
def test_every_call_has_a_deadline(server, connect):
    release = threading.Event()
    with connect(server.target, timeout_s=60) as client:
        client.model()
        server.service.hook = lambda asked: release.wait(20)
        try:
            with pytest.raises(DeadlineExceeded, match=r"no answer from 127\.0\.0\.1:\d+ within 0\.2 s") as caught:
                client.encode(IMAGES, timeout_s=0.2)
        finally:
            release.set()
    assert isinstance(caught.value, TimeoutError)


@both_clients
def test_the_deadline_holds_over_all_attempts(server, connect):
    with connect(server.target) as client:
        client.model()
        server.service.faults = [refuse(EXHAUSTED, grpc_retry_pushback_ms="60000")] * 5
        began = time.monotonic()
        with pytest.raises((DeadlineExceeded, ResourceExhausted)):
            client.encode(IMAGES, timeout_s=0.3)
    assert time.monotonic() - began < 5


@both_clients
@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_no_deadline_is_no_choice(connect, timeout_s):
    with pytest.raises(InvalidArgument, match="positive finite number of seconds"):
        connect(NOBODY, timeout_s=timeout_s)


@both_clients
def test_an_unreachable_server_is_named_with_what_to_check(connect):
    with connect(NOBODY) as client, pytest.raises(Unavailable) as caught:
        client.encode(IMAGES)
    assert str(caught.value) == (
        "no vaeserve server can be reached at 127.0.0.1:1 (Connection refused); check that it runs, the host and port, "
        "that both sides use TLS or neither does, and the client's certificate if the server wants one"
    )
    assert isinstance(caught.value, ConnectionError)


@both_clients
def test_a_server_that_never_answers_is_given_up(connect):
    with silent_target() as target, connect(target) as client:
        with pytest.raises((DeadlineExceeded, Unavailable)):
            client.model(timeout_s=0.3)
        assert client.healthy(timeout_s=0.3) is False


@both_clients
def test_healthy_says_what_the_health_service_says(server, connect):
    with connect(server.target) as client:
        assert client.healthy() is True
        server.health.statuses = [health_pb2.HealthCheckResponse.NOT_SERVING]
        assert client.healthy() is False
    with connect(NOBODY) as client:
        assert client.healthy() is False


@both_clients
def test_wait_ready_waits_for_the_word(server, connect):
    states = health_pb2.HealthCheckResponse
    server.health.statuses = [states.SERVICE_UNKNOWN, states.NOT_SERVING, states.SERVING]
    with connect(server.target) as client:
        client.wait_ready(20)
    assert server.health.watched.is_set()


@both_clients
def test_wait_ready_gives_up_and_says_what_it_last_heard(server, connect):
    server.health.statuses = [health_pb2.HealthCheckResponse.NOT_SERVING]
    with (
        connect(server.target) as client,
        pytest.raises(DeadlineExceeded, match=r"was not ready within 0\.3 s; it last said NOT_SERVING"),
    ):
        client.wait_ready(0.3)
    with connect(NOBODY) as client, pytest.raises(DeadlineExceeded, match="nothing answered there"):
        client.wait_ready(0.3)


@both_clients
def test_wait_ready_finds_a_server_that_starts_later(connect):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = threading.Event()
    done = threading.Event()

    def serve_later():
        started.wait(20)
        with faulty_server(port=port):
            done.wait(20)

    thread = threading.Thread(target=serve_later)
    thread.start()
    try:
        with connect(f"127.0.0.1:{port}") as client:
            assert not client.healthy()
            started.set()
            client.wait_ready(20)
            assert client.healthy()
    finally:
        started.set()
        done.set()
        thread.join()


@both_clients
def test_something_else_at_that_address_is_told_apart(server, connect):
    server.service.faults = [refuse(StatusCode.UNIMPLEMENTED, "Method not found!")]
    with connect(server.target) as client, pytest.raises(Unimplemented):
        client.model()


@both_clients
def test_a_closed_client_says_so(server, connect):
    client = connect(server.target)
    with client:
        client.encode(IMAGES)
        client.close()
        with pytest.raises(ClientClosed, match="is closed; make a new one"):
            client.encode(IMAGES)
        with pytest.raises(ClientClosed):
            client.healthy()
        with pytest.raises(ClientClosed):
            client.wait_ready()


def test_closing_ends_calls_that_other_threads_have_under_way(server):
    arrived, release = threading.Event(), threading.Event()

    def hold(asked):
        arrived.set()
        release.wait(20)

    caught = []

    def ask():
        try:
            client.encode(IMAGES)
        except Cancelled as error:
            caught.append(error)

    with Client(server.target) as client:
        client.model()
        server.service.hook = hold
        thread = threading.Thread(target=ask)
        thread.start()
        assert arrived.wait(20)
        client.close()
        thread.join(20)
        release.set()
    assert len(caught) == 1


@both_clients
def test_several_connections_share_the_calls(server, connect):
    peers = set()
    original = server.service._call

    def spy(asked, context, model):
        peers.add(context.peer())
        return original(asked, context, model)

    server.service._call = spy
    with connect(server.target, connections=3, rows_per_call=1) as client:
        client.encode(np.zeros((12, *IMAGE_SHAPE), np.uint8))
    assert len(peers) == 3


@both_clients
def test_token_and_metadata_travel_with_every_call(server, connect):
    with connect(server.target, token="secret", metadata={"X-Team": "vision"}) as client:
        client.encode(IMAGES)
        client.models()
    assert len(server.service.asked) == 3
    for call in server.service.asked:
        assert call.metadata["authorization"] == "Bearer secret"
        assert call.metadata["x-team"] == "vision"


def test_asyncio_tasks_are_cancelled_one_by_one(server):
    calls = queue.SimpleQueue()
    release = threading.Event()

    def hold(asked):
        calls.put(asked)
        if asked.rows == 2:
            release.wait(20)

    async def scenario():
        async with AsyncClient(server.target) as client:
            await client.model()
            server.service.hook = hold
            slow = asyncio.create_task(client.encode(IMAGES))
            await asyncio.to_thread(calls.get, timeout=20)
            assert len(await client.encode(IMAGES[:1])) == 1
            await asyncio.to_thread(calls.get, timeout=20)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            held = asyncio.create_task(client.encode(IMAGES))
            await asyncio.to_thread(calls.get, timeout=20)
            await client.close()
            with pytest.raises(Cancelled):
                await held

    try:
        asyncio.run(scenario())
    finally:
        release.set()


@both_clients
def test_several_servers_are_taken_in_turn_and_one_that_does_not_serve_is_left_out(server, connect):
    with faulty_server() as second, faulty_server() as loading:
        loading.health.statuses = [health_pb2.HealthCheckResponse.NOT_SERVING]
        loading.health.held = threading.Event()
        targets = [loading.target, server.target, second.target]
        try:
            with connect("ipv4:" + ",".join(targets), rows_per_call=1) as client:
                client.encode(np.zeros((40, *IMAGE_SHAPE), np.uint8))
        finally:
            loading.health.held.set()
    assert server.service.calls("Encode")
    assert second.service.calls("Encode")
    assert not loading.service.asked
