"""Bad input gets the server's words, whether this side or the server saw it first, and both clients say the same."""

import grpc
import numpy as np
import pytest

from both_clients import AwaitedClient
from serving import running_server
from vaeserve import (
    Client,
    FailedPrecondition,
    InvalidArgument,
    ModelRef,
    NotFound,
    tensors,
)
from vaeserve.v1 import vae_pb2, vae_pb2_grpc


@pytest.fixture(scope="module")
def server(models_dir):
    with running_server(models_dir, max_rows_per_call=64) as running:
        yield running


@pytest.fixture(scope="module", params=[Client, AwaitedClient], ids=["blocking", "asyncio"])
def client(server, request):
    with request.param(server.target) as connected:
        connected.wait_ready(30)
        yield connected


@pytest.fixture(scope="module")
def refused(server):
    """Return a function that makes a call with no SDK in between and returns the status it ends with."""
    with grpc.insecure_channel(server.target) as channel:
        stub = vae_pb2_grpc.VaeServiceStub(channel)

        def refused(method, request):
            with pytest.raises(grpc.RpcError) as caught:
                getattr(stub, method)(request, timeout=30)
            return caught.value

        yield refused


def nan_at(row, rows=3):
    images = np.zeros((rows, 1, 28, 28), np.float32)
    images[row, 0, 5, 5] = np.nan
    return images


def brightest(value, row, rows=3):
    images = np.zeros((rows, 1, 28, 28), np.float32)
    images[row, 0, 5, 5] = value
    return images


IMAGES = {
    "rank": np.zeros((2, 784), np.uint8),
    "channels": np.zeros((2, 3, 28, 28), np.uint8),
    "size": np.zeros((2, 1, 32, 32), np.uint8),
    "no rows": np.zeros((0, 1, 28, 28), np.uint8),
    "NaN": nan_at(1),
    "infinity": brightest(np.inf, 2),
    "above 1": brightest(200.0, 1),
    "below 0": brightest(-0.5, 0),
}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES.keys())
def test_images(client, refused, images):
    status = refused("Encode", vae_pb2.EncodeRequest(images=tensors.to_tensor(images)))
    with pytest.raises(InvalidArgument) as caught:
        client.encode(images)
    assert status.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value) == status.details()
    assert [(each.field, each.description) for each in caught.value.violations] == [("images", status.details())]


LATENTS = {
    "rank": np.zeros((2, 2, 20), np.float32),
    "size": np.zeros((2, 21), np.float32),
    "no rows": np.zeros((0, 20), np.float32),
    "NaN": np.full((2, 20), np.nan, np.float32),
    "infinity": np.full((2, 20), -np.inf, np.float32),
}


@pytest.mark.parametrize("latents", LATENTS.values(), ids=LATENTS.keys())
def test_latents(client, refused, latents):
    status = refused("Decode", vae_pb2.DecodeRequest(latents=tensors.to_tensor(latents)))
    with pytest.raises(InvalidArgument) as caught:
        client.decode(latents)
    assert status.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value) == status.details()
    assert [(each.field, each.description) for each in caught.value.violations] == [("latents", status.details())]


@pytest.mark.parametrize(
    ("request_fields", "arguments"),
    [
        ({"count": 0}, {"count": 0}),
        ({"count": -3}, {"count": -3}),
        ({"count": 1, "temperature": -1}, {"count": 1, "temperature": -1}),
        ({"count": 1, "temperature": float("nan")}, {"count": 1, "temperature": float("nan")}),
        ({"count": 2, "first_row": 2**64 - 1}, {"count": 2, "first_row": 2**64 - 1}),
    ],
)
def test_samples(client, refused, request_fields, arguments):
    status = refused("Sample", vae_pb2.SampleRequest(**request_fields))
    with pytest.raises(InvalidArgument) as caught:
        client.sample(**arguments)
    assert str(caught.value) == status.details()


@pytest.mark.parametrize("stream", [iter([]), []], ids=["iterator", "list"])
def test_nothing_at_all_is_no_rows(client, stream):
    with pytest.raises(InvalidArgument, match="images have 0 rows; one call to model mnist/1 takes 1 to 64 rows"):
        client.encode(stream)


def test_more_rows_than_one_call_takes_are_several_calls(client):
    assert len(client.encode(np.zeros((200, 28, 28), np.uint8))) == 200
    assert len(client.sample(200)) == 200


@pytest.mark.parametrize(("bad_row", "rows"), [(0, 200), (63, 200), (150, 200), (199, 200)])
def test_the_row_named_is_the_callers(client, bad_row, rows):
    with pytest.raises(InvalidArgument, match=f"^images row {bad_row} has the value nan; every value must be finite$"):
        client.encode(nan_at(bad_row, rows))
    latents = np.zeros((rows, 20), np.float32)
    latents[bad_row] = np.inf
    with pytest.raises(InvalidArgument, match=f"^latents row {bad_row} has the value inf"):
        client.decode(latents)


def test_what_float32_cannot_hold_is_infinite(client):
    with pytest.raises(InvalidArgument, match="latents row 1 has the value inf"):
        client.decode(np.array([[0.0] * 20, [1e300] * 20]))


@pytest.mark.parametrize("model", ["cat", "mnist/7"])
def test_unknown_models(client, refused, model):
    name, _, version = model.partition("/")
    status = refused("GetModel", vae_pb2.GetModelRequest(model=vae_pb2.ModelRef(name=name, version=version)))
    for verb in (lambda: client.model(model), lambda: client.encode(nan_at(0), model=model)):
        with pytest.raises(NotFound) as caught:
            verb()
        assert str(caught.value) == status.details()


def test_the_digest_of_another_model(client, refused):
    ref = ModelRef("mnist", "1", "0" * 64)
    status = refused("GetModel", vae_pb2.GetModelRequest(model=ref.message()))
    for verb in (
        lambda: client.model(ref),
        lambda: client.encode(np.zeros((1, 28, 28), np.uint8), model=ref),
        lambda: client.decode(np.zeros((1, 20)), model=ref),
        lambda: client.sample(1, model=ref),
    ):
        with pytest.raises(FailedPrecondition) as caught:
            verb()
        assert str(caught.value) == status.details()
        assert caught.value.reason == "DIGEST_MISMATCH"


def test_a_prior_that_the_model_does_not_have(client):
    with pytest.raises(FailedPrecondition, match="has no fitted prior"):
        client.sample(1, prior="fitted")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda client: client.sample(1, prior="flow"), "prior is 'flow'; give one of 'standard_normal', 'fitted'"),
        (lambda client: client.sample(1, seed=-1), r"seed is -1; it must be in \[0, 2\*\*64\)"),
        (lambda client: client.sample(1, seed=2**64), r"seed is \d+; it must be in \[0, 2\*\*64\)"),
        (lambda client: client.sample(1, first_row=-1), r"first_row is -1; it must be in"),
        (lambda client: client.sample(1, dtype="int8"), "dtype is 'int8'; images come as float32, float16 or uint8"),
        (lambda client: client.sample(1, dtype="nonsense"), "dtype is 'nonsense'"),
        (lambda client: client.encode(np.zeros((1, 28, 28), np.uint8), seed=1), "set want_latents"),
        (lambda client: client.encode(np.zeros((1, 28, 28), np.uint8), model=3), "model is 3; give"),
        (lambda client: client.encode(np.zeros((1, 28, 28), int)), "images are int64; model mnist/1 takes uint8 or"),
        (lambda client: client.decode(np.zeros((1, 20), complex)), "latents are complex128; model mnist/1 takes"),
    ],
)
def test_what_only_this_side_can_see(client, call, words):
    with pytest.raises(InvalidArgument, match=words):
        call(client)


@pytest.mark.parametrize("make", [Client, AwaitedClient], ids=["blocking", "asyncio"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": ""}, "target is empty; give host:port"),
        ({"rows_per_call": 0}, "rows_per_call is 0; give 1 or more"),
        ({"calls_in_flight": 0}, "calls_in_flight is 0; give 1 or more"),
        ({"max_attempts": 6}, r"max_attempts is 6; give 1 \(no retry\) to 5"),
        ({"connections": 0}, "connections is 0; give 1 or more"),
    ],
)
def test_settings_that_cannot_be(make, settings, words):
    with pytest.raises(InvalidArgument, match=words):
        make(**settings)
