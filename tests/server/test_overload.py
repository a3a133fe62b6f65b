"""Calls that are cancelled, expire, are abandoned, are too many, or break the graph: nothing of them stays behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from bundles import ENCODER, brittle_encoder, slow_encoder, write_bundle
from http2 import Connection
from serving import RunningServer, queued_rows, running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server.service import VaeService

_ENCODE = "/vaeserve.v1.VaeService/Encode"

Stub = vae_pb2_grpc.VaeServiceStub
IMAGE, LATENT = (1, 4, 4), (3,)
HALF_A_SECOND, A_FEW_SECONDS, MUCH_TOO_LONG = 0.01, 0.08, 1.0


def request(rows: int = 1, pixel: float = 0.0) -> pb.EncodeRequest:
    return pb.EncodeRequest(images=tensors.to_tensor(np.full((rows, *IMAGE), pixel, np.float32)))


@pytest.fixture(scope="module")
def slow_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow")
    write_bundle(folder, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: slow_encoder(IMAGE, LATENT)})
    return folder


@pytest.fixture
def slow_server(slow_models: Path) -> Iterator[RunningServer]:
    with running_server(slow_models, threads=1, max_queue_rows=2000, max_batch_rows=64, drain_s=0) as server:
        yield server


@pytest.fixture
def channel(slow_server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(slow_server.target) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> Stub:
    return Stub(channel)


def occupy(server: RunningServer, stub: Stub, pixel: float) -> grpc.Future:
    """Start a run that takes its time; return when a thread has it."""
    call = stub.Encode.future(request(pixel=pixel))
    server.until(lambda running: _runs(running) == 1)
    return call


def _runs(server: object) -> int:
    pool = server.models.pool  # type: ignore[attr-defined]
    return pool.threads - pool._free


def failure(call: grpc.Future) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call.result()
    return raised.value


def test_an_expired_call_leaves_the_queue_while_the_run_before_it_goes_on(
    slow_server: RunningServer, stub: Stub
) -> None:
    slow = occupy(slow_server, stub, MUCH_TOO_LONG)
    assert failure(stub.Encode.future(request(), timeout=0.05)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    slow_server.until(lambda server: queued_rows(server) == 0)
    assert not slow.done()
    slow.cancel()


def test_a_storm_of_cancels_leaves_an_empty_queue(slow_server: RunningServer, stub: Stub) -> None:
    slow = occupy(slow_server, stub, A_FEW_SECONDS)
    calls = [stub.Encode.future(request()) for _ in range(1000)]
    slow_server.until(lambda server: queued_rows(server) > 0)
    for call in calls:
        call.cancel()
    slow_server.until(lambda server: queued_rows(server) == 0)
    assert slow.result().mean.shape == [1, 3]
    assert stub.Encode(request()).mean.shape == [1, 3]


def test_a_client_that_goes_away_takes_its_calls_with_it(slow_server: RunningServer, stub: Stub) -> None:
    slow = occupy(slow_server, stub, A_FEW_SECONDS)
    leaving = grpc.insecure_channel(slow_server.target)
    calls = [Stub(leaving).Encode.future(request()) for _ in range(200)]
    slow_server.until(lambda server: queued_rows(server) == 200)
    leaving.close()
    slow_server.until(lambda server: queued_rows(server) == 0)
    assert all(call.code() == grpc.StatusCode.CANCELLED for call in calls)
    assert slow.result().mean.shape == [1, 3]
    assert stub.Encode(request()).mean.shape == [1, 3]


def test_a_client_that_goes_away_during_its_run_stops_nothing(slow_server: RunningServer, stub: Stub) -> None:
    leaving = grpc.insecure_channel(slow_server.target)
    occupy(slow_server, Stub(leaving), HALF_A_SECOND)
    leaving.close()
    assert stub.Encode(request()).mean.shape == [1, 3]


def test_a_full_queue_answers_with_push_back(slow_server: RunningServer, stub: Stub) -> None:
    slow = occupy(slow_server, stub, MUCH_TOO_LONG)
    queued = stub.Encode.future(request(rows=1999))
    slow_server.until(lambda server: queued_rows(server) == 1999)
    error = failure(stub.Encode.future(request(rows=2)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details().startswith("the queue holds 1999 of at most 2000 rows and the call has 2; try again in ")
    pushback_ms = int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])
    assert pushback_ms > 0
    retry = error_details_pb2.RetryInfo()
    assert (
        status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        .details[1]
        .Unpack(retry)
    )
    assert retry.retry_delay.ToMilliseconds() == pushback_ms
    last = stub.Encode.future(request(rows=1))  # what fits is taken
    slow_server.until(lambda server: queued_rows(server) == 2000)
    for call in (slow, queued, last):
        call.cancel()


def test_while_not_one_row_fits_calls_are_refused_unread(slow_server: RunningServer, channel: grpc.Channel) -> None:
    stub = Stub(channel)
    slow = occupy(slow_server, stub, MUCH_TOO_LONG)
    queued = stub.Encode.future(request(rows=2000))
    slow_server.until(lambda server: queued_rows(server) == 2000)
    error = failure(channel.unary_unary(_ENCODE, None, None).future(b"\xff no message"))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details().startswith("the queue is full; try again in ")
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    with Connection(slow_server.target) as connection:  # whose request never comes
        assert connection.outcome(connection.open(_ENCODE)) == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
    sample = stub.Sample.future(pb.SampleRequest(count=1))
    slow_server.until(lambda server: queued_rows(server) == 2001)  # the decoder's queue is another one
    for call in (slow, queued, sample):
        call.cancel()


@pytest.mark.parametrize(
    ("queues", "retry_s"), [((), None), ((2.0, None), None), ((None, 2.0), None), ((3.0, 2.0), 2.0)]
)
def test_calls_are_refused_unread_only_while_every_models_queue_is_full(
    queues: tuple[float | None, ...], retry_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = VaeService()
    engines = [SimpleNamespace(full_queue=lambda _, wait_s=wait_s: _full(wait_s)) for wait_s in queues]
    monkeypatch.setattr(service, "_repository", SimpleNamespace(engines=engines))
    assert service.retry_encode_s() == service.retry_decode_s() == service.retry_any_s() == retry_s


def _full(wait_s: float | None) -> SimpleNamespace | None:
    return None if wait_s is None else SimpleNamespace(retry_after_s=lambda: wait_s)


def test_a_call_larger_than_the_queue_is_told_not_to_come_back(slow_server: RunningServer, stub: Stub) -> None:
    error = failure(stub.Encode.future(request(rows=2001)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "the call has 2001 rows but the queue holds 2000; send fewer rows in one call"
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"


@pytest.mark.in_process
def test_a_run_that_fails_fails_its_own_call_and_tells_it_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: brittle_encoder(IMAGE, LATENT)})
    with (
        running_server(tmp_path, threads=1) as server,
        grpc.insecure_channel(server.target) as channel,
        ThreadPoolExecutor(8) as pool,
    ):
        stub = Stub(channel)
        bad = [pool.submit(lambda: failure(stub.Encode.future(request(pixel=1.0)))) for _ in range(4)]
        good = [pool.submit(stub.Encode, request(rows=3, pixel=0.5)) for _ in range(40)]
        assert all(answer.result().mean.shape == [3, 3] for answer in good)
        errors = [error.result() for error in bad]
    records = {record.fields["call_id"]: record for record in caplog.records if record.levelno == logging.ERROR}
    for error in errors:
        assert error.code() == grpc.StatusCode.INTERNAL
        call_id = error.details().rpartition(" ")[2]
        assert error.details() == f"the server failed; its log has the details under call id {call_id}"
        assert "indices element out of data bounds" in str(records.pop(call_id).exc_info)
    assert not records


def test_no_message_limit_is_met_before_the_row_limit(tmp_path: Path) -> None:
    write_bundle(tmp_path, image_shape=(3, 32, 32), latent_shape=(5,))
    with (
        running_server(tmp_path, max_message_bytes=1_000_000) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub = Stub(channel)
        limit = stub.GetModel(pb.GetModelRequest()).serving.max_rows_per_call
        assert 30 <= limit <= 40  # half a megabyte of 12 kB each

        def encode(rows: int) -> pb.EncodeResponse:
            images = np.zeros((rows, 3, 32, 32), np.float32)
            return stub.Encode(pb.EncodeRequest(images=tensors.to_tensor(images)))

        assert encode(limit).mean.shape == [limit, 5]
        for rows in (limit + 1, 2 * limit):
            with pytest.raises(grpc.RpcError, match=f"images have {rows} rows; one call to .* takes 1 to {limit} rows"):
                encode(rows)
        with pytest.raises(grpc.RpcError, match="larger than max") as transport:
            encode(3 * limit)
        assert transport.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert encode(1).mean.shape == [1, 5]
