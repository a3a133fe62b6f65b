"""Callers that hold connections and calls without using them: bounded in number and time, and in nobody's way."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

import metrics_page
from bundles import ENCODER, slow_encoder, write_bundle
from http2 import Connection, frame
from serving import RunningServer, running_server
from vaeserve import Client, ResourceExhausted, tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import transport_grpc

IMAGE, LATENT = (1, 4, 4), (3,)
A_SECOND = 0.02
LIMIT_S = 30.0
LORISES = 200
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
ENCODE = "/vaeserve.v1.VaeService/Encode"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose encoder takes a minute times the brightest pixel."""
    folder = tmp_path_factory.mktemp("models")
    write_bundle(folder, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: slow_encoder(IMAGE, LATENT)})
    return folder


def images(pixel: float = 0.0) -> np.ndarray:
    return np.full((1, *IMAGE), pixel, np.float32)


def request(pixel: float = 0.0) -> pb.EncodeRequest:
    return pb.EncodeRequest(images=tensors.to_tensor(images(pixel)))


def connect(server: RunningServer) -> socket.socket:
    host, _, port = server.target.rpartition(":")
    return socket.create_connection((host, int(port)), LIMIT_S)


def wait_closed(connection: socket.socket) -> None:
    """Read until the server closes; a timeout if it does not."""
    connection.settimeout(LIMIT_S)
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass


def is_taken(server: RunningServer) -> bool:
    """Try a call on a connection of its own."""
    with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            vae_pb2_grpc.VaeServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=LIMIT_S)
        except grpc.RpcError:
            return False
    return True


@pytest.fixture
def few(models: Path) -> Iterator[RunningServer]:
    with running_server(models, max_connections=6) as server:
        yield server


def test_connections_are_bounded_in_number(few: RunningServer) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(connect(few)) for _ in range(6)]
        for each in held:
            each.sendall(PREFACE)
            assert each.recv(9)  # its place is taken
        with connect(few) as one_more:
            wait_closed(one_more)
        assert not is_taken(few)
    deadline = time.monotonic() + LIMIT_S
    while not is_taken(few):
        assert time.monotonic() < deadline, "places that are free again are not given"


def test_a_connection_without_a_call_is_closed_and_one_with_a_call_is_not(models: Path) -> None:
    with running_server(models, idle_s=0.3) as server, grpc.insecure_channel(server.target) as channel:
        busy = vae_pb2_grpc.VaeServiceStub(channel).Encode.future(request(A_SECOND))
        with connect(server) as idle:
            idle.sendall(PREFACE)
            wait_closed(idle)
        assert busy.result().mean.shape == [1, 3]


def test_a_peer_that_is_gone_is_found_out(models: Path) -> None:
    with running_server(models, idle_s=0, keepalive_s=1.0) as server, connect(server) as half_open:
        half_open.sendall(PREFACE)
        wait_closed(half_open)  # it reads, and answers no ping


def test_connections_that_are_old_are_renewed_and_no_call_is_lost(models: Path) -> None:
    with (
        running_server(models, connection_age_s=0.3) as server,
        Client(server.target, max_attempts=1) as client,
        Connection(server.target) as watched,
    ):
        while watched.read():  # until it is told to go, its own calls done
            assert len(client.encode(images())) == 1
            if watched.gone:
                break
        assert len(client.encode(images(A_SECOND))) == 1


@pytest.mark.in_process
def test_a_connection_must_come_to_its_beginning(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_grpc, "HANDSHAKE_S", 0.3)
    with running_server(models, idle_s=0, keepalive_s=0) as server, ExitStack() as stack:
        silent, dribbling = stack.enter_context(connect(server)), stack.enter_context(connect(server))
        wait_closed(silent)
        with pytest.raises(ConnectionError):
            for byte in PREFACE * 1000:
                dribbling.send(bytes([byte]))
                time.sleep(0.02)


def test_lorises_stop_nobody(models: Path) -> None:
    with running_server(models, max_calls=8) as server, ExitStack() as stack:
        crowd = [stack.enter_context(connect(server)) for _ in range(LORISES // 2)]
        half_sent = [stack.enter_context(Connection(server.target)) for _ in range(LORISES // 2)]
        streams = [each.open(ENCODE) for each in half_sent]
        body = frame(request().SerializeToString())
        with Client(server.target, timeout_s=LIMIT_S) as client:
            for at in range(20):
                for which, each in enumerate(crowd):
                    each.send(PREFACE[at : at + 1] if which % 2 else b"" if at else PREFACE)
                for each, stream in zip(half_sent, streams, strict=True):
                    each.send(stream, body[at : at + 1], end=False)
                encode_when_there_is_room(client)


def encode_when_there_is_room(client: Client) -> None:
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            assert len(client.encode(images())) == 1
        except ResourceExhausted:
            assert time.monotonic() < deadline, "those who send nothing keep all places"
        else:
            return


def check_details(serialised: bytes, message: str) -> None:
    """See that the details of a refusal say what its status and push-back do."""
    rich = status_pb2.Status.FromString(serialised)
    assert (rich.code, rich.message) == (code_pb2.RESOURCE_EXHAUSTED, message)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    packed = rich.details
    assert len(packed) == 2
    assert packed[0].Unpack(info)
    assert packed[1].Unpack(retry)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "vaeserve")
    assert 100 <= retry.retry_delay.ToMilliseconds() <= 200


def test_calls_are_bounded_in_number_and_health_is_not(models: Path) -> None:
    with running_server(models, max_calls=4, threads=1) as server, grpc.insecure_channel(server.target) as channel:
        stub = vae_pb2_grpc.VaeServiceStub(channel)
        held = [stub.Encode.future(request(A_SECOND)) for _ in range(4)]
        server.until(lambda running: running._calls._in_flight == 4)
        late = stub.Encode.future(request())
        assert late.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert late.details().startswith("the server has 4 calls in hand, as many as it takes; try again")
        told = dict(late.trailing_metadata())
        assert 100 <= int(told["grpc-retry-pushback-ms"]) <= 200
        check_details(told["grpc-status-details-bin"], late.details())
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        with Client(server.target, max_attempts=1) as client, pytest.raises(ResourceExhausted) as refused:
            client.encode(images())
        assert refused.value.reason == "QUEUE_FULL"
        page = metrics_page.scrape(server)
        assert page("vaeserve_refused_total") == page("vaeserve_calls_total", code="RESOURCE_EXHAUSTED") == 2
        assert all(call.result().mean.shape == [1, 3] for call in held)
        assert stub.Encode(request()).mean.shape == [1, 3]
