"""What a caller learns of its call besides the answer: its id, and where its time went."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import grpc
import numpy as np
import pytest

from bundles import ENCODER, brittle_encoder, write_bundle
from test_lifecycle import server_process
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

Stub = vae_pb2_grpc.VaeServiceStub
IMAGE, LATENT = (1, 4, 4), (3,)
KEYS = {"vaeserve-call-id", "vaeserve-queue-us", "vaeserve-compute-us", "vaeserve-batch-rows"}


def trailers(call: grpc.Call | grpc.RpcError) -> dict[str, str]:
    metadata = call.trailing_metadata()  # type: ignore[union-attr]
    return {key: value for key, value in metadata if key.startswith("vaeserve-")}


def test_an_answer_says_where_its_time_went(stub: Stub) -> None:
    request = pb.SampleRequest(model=pb.ModelRef(name="mnist"), count=60)
    _, call = stub.Sample.with_call(request)
    told = trailers(call)
    assert told.keys() == KEYS
    assert int(told["vaeserve-queue-us"]) >= 0
    assert 0 < int(told["vaeserve-compute-us"]) < 60e6
    assert 1 <= int(told["vaeserve-batch-rows"]) <= 60


def test_a_call_through_two_graphs_adds_them_up(stub: Stub) -> None:
    request = pb.SampleRequest(model=pb.ModelRef(name="faces"), count=1, prior=pb.PRIOR_FITTED)
    told = trailers(stub.Sample.with_call(request)[1])
    assert told["vaeserve-batch-rows"] == "1"
    assert int(told["vaeserve-compute-us"]) > 0


def test_a_call_that_runs_nothing_has_an_id_alone(stub: Stub) -> None:
    assert trailers(stub.ListModels.with_call(pb.ListModelsRequest())[1]).keys() == {"vaeserve-call-id"}


def test_ids_are_distinct_and_a_refusal_has_one_too(stub: Stub) -> None:
    ids = [trailers(stub.ListModels.with_call(pb.ListModelsRequest())[1])["vaeserve-call-id"] for _ in range(50)]
    with pytest.raises(grpc.RpcError) as refusal:
        stub.Sample(pb.SampleRequest(model=pb.ModelRef(name="mnist"), count=0))
    ids.append(trailers(refusal.value)["vaeserve-call-id"])
    assert len(set(ids)) == 51
    assert all(re.fullmatch("[0-9a-f]{16}", call_id) for call_id in ids)


def test_the_log_has_each_call_under_the_id_that_its_caller_got(tmp_path: Path) -> None:
    write_bundle(tmp_path, "quick", image_shape=IMAGE, latent_shape=LATENT)
    with (
        server_process(tmp_path, "--log-level", "debug", "--log-format", "json") as process,
        grpc.insecure_channel(process.target) as channel,
    ):
        stub = Stub(channel)
        answered = trailers(stub.Sample.with_call(pb.SampleRequest(count=2))[1])
        with pytest.raises(grpc.RpcError) as refusal:
            stub.Sample(pb.SampleRequest(count=0))
        process.signal(signal.SIGTERM)
        _, log = process.end()
    logged = {entry["call_id"]: entry["code"] for entry in map(json.loads, log.splitlines()) if "call_id" in entry}
    told = (answered["vaeserve-call-id"], "OK"), (trailers(refusal.value)["vaeserve-call-id"], "INVALID_ARGUMENT")
    assert logged == dict(told)


def test_a_fault_is_told_by_its_id_alone_under_which_the_log_has_it(tmp_path: Path) -> None:
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: brittle_encoder(IMAGE, LATENT)})
    images = [tensors.to_tensor(np.full((1, *IMAGE), pixel, np.float32)) for pixel in (1.0, 0.5)]
    with (
        server_process(tmp_path, "--log-format", "json") as process,
        grpc.insecure_channel(process.target) as channel,
    ):
        stub = Stub(channel)
        with pytest.raises(grpc.RpcError) as fault:
            stub.Encode(pb.EncodeRequest(images=images[0]))
        assert stub.Encode(pb.EncodeRequest(images=images[1])).mean.shape == [1, 3]
        process.signal(signal.SIGTERM)
        _, log = process.end()
    call_id = trailers(fault.value)["vaeserve-call-id"]
    assert fault.value.code() == grpc.StatusCode.INTERNAL
    assert fault.value.details() == f"the server failed; its log has the details under call id {call_id}"
    (entry,) = (entry for entry in map(json.loads, log.splitlines()) if entry["level"] == "error")
    assert (entry["message"], entry["call_id"]) == ("call failed", call_id)
    assert "indices element out of data bounds" in entry["exception"]
