"""Bad input of every kind: the right status, words a person can act on, details for programs, a server that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

Stub = vae_pb2_grpc.VaeServiceStub
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION

MNIST = pb.ModelRef(name="mnist")
FACES = pb.ModelRef(name="faces")


@pytest.fixture(autouse=True)
def _goes_on(stub: Stub) -> Iterator[None]:
    """Whatever a test sent, the next good call succeeds."""
    yield
    assert stub.Sample(pb.SampleRequest(model=MNIST, count=1)).images.shape == [1, 1, 28, 28]


def encode(images: Any, **fields: Any) -> pb.EncodeRequest:
    tensor = images if isinstance(images, pb.Tensor) else tensors.to_tensor(images)
    return pb.EncodeRequest(**{"model": MNIST, **fields}, images=tensor)


def decode(latents: Any, **fields: Any) -> pb.DecodeRequest:
    tensor = latents if isinstance(latents, pb.Tensor) else tensors.to_tensor(latents)
    return pb.DecodeRequest(**{"model": MNIST, **fields}, latents=tensor)


def sample(**fields: Any) -> pb.SampleRequest:
    return pb.SampleRequest(**{"model": MNIST, "count": 1, **fields})


def images(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def with_value(array: np.ndarray, row: int, value: float) -> np.ndarray:
    array = array.copy()
    array[row].flat[3] = value
    return array


def raw(dtype: int, shape: list[int], data: bytes) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]


GOOD = images(5, 1, 28, 28)
LATENTS = np.zeros((5, 4), np.float32)
IMAGE_BYTES = bytes(784 * 4)

TABLE: dict[str, tuple[Message, grpc.StatusCode, str, str]] = {
    "wrong size": (
        encode(images(2, 3, 32, 32)),
        INVALID,
        "images",
        "images have shape (3, 32, 32); model mnist/2 takes (1, 28, 28)",
    ),
    "wrong channels": (
        encode(images(2, 3, 28, 28, dtype=np.uint8)),
        INVALID,
        "images",
        "images have shape (3, 28, 28); model mnist/2 takes (1, 28, 28)",
    ),
    "wrong rank": (
        encode(images(28, 28)),
        INVALID,
        "images",
        "images have shape (28, 28) in all; model mnist/2 takes (N, 1, 28, 28), N rows of shape (1, 28, 28)",
    ),
    "one image without rows": (
        encode(images(1, 28, 28)),
        INVALID,
        "images",
        "images have shape (1, 28, 28) in all; model mnist/2 takes (N, 1, 28, 28), N rows of shape (1, 28, 28)",
    ),
    "a scalar": (
        encode(images()),
        INVALID,
        "images",
        "images have shape () in all; model mnist/2 takes (N, 1, 28, 28)",
    ),
    "wrong latent size": (
        decode(np.zeros((2, 5), np.float32)),
        INVALID,
        "latents",
        "latents have shape (5,); model mnist/2 takes (4,)",
    ),
    "flat latent for a spatial one": (
        decode(np.zeros((2, 32), np.float32), model=FACES),
        INVALID,
        "latents",
        "latents have shape (2, 32) in all; model faces/9 takes (N, 2, 4, 4), N rows of shape (2, 4, 4)",
    ),
    "latents of bytes": (
        decode(np.zeros((2, 4), np.uint8)),
        INVALID,
        "latents",
        "latents are uint8; model mnist/2 takes float32 or float16",
    ),
    "data too short": (
        encode(raw(pb.DATA_TYPE_FLOAT32, [2, 1, 28, 28], IMAGE_BYTES)),
        INVALID,
        "images.data",
        "images: data has 3136 bytes; shape (2, 1, 28, 28) of float32 takes 6272",
    ),
    "data too long": (
        decode(raw(pb.DATA_TYPE_FLOAT16, [1, 4], bytes(9))),
        INVALID,
        "latents.data",
        "latents: data has 9 bytes; shape (1, 4) of float16 takes 8",
    ),
    "no dtype": (
        encode(raw(0, [1, 1, 28, 28], IMAGE_BYTES)),
        INVALID,
        "images.dtype",
        "images: dtype is not set; set one of DATA_TYPE_FLOAT32 (1), DATA_TYPE_UINT8 (2), DATA_TYPE_FLOAT16 (3)",
    ),
    "unknown dtype": (
        encode(raw(99, [1, 1, 28, 28], IMAGE_BYTES)),
        INVALID,
        "images.dtype",
        "images: dtype 99 is not one of DATA_TYPE_FLOAT32 (1), DATA_TYPE_UINT8 (2), DATA_TYPE_FLOAT16 (3)",
    ),
    "negative axis": (
        encode(raw(pb.DATA_TYPE_FLOAT32, [-1, 1, 28, 28], IMAGE_BYTES)),
        INVALID,
        "images.shape",
        "images: shape (-1, 1, 28, 28) has a negative axis",
    ),
    "two negative axes": (
        encode(raw(pb.DATA_TYPE_FLOAT32, [-1, -1, 28, 28], IMAGE_BYTES)),
        INVALID,
        "images.shape",
        "images: shape (-1, -1, 28, 28) has a negative axis",
    ),
    "overflowing shape": (
        encode(raw(pb.DATA_TYPE_FLOAT32, [2**62, 4, 28, 28], IMAGE_BYTES)),
        INVALID,
        "images.shape",
        f"images: shape ({2**62}, 4, 28, 28) of float32 is too large: {2**62 * 4 * 784 * 4} bytes",
    ),
    "overflowing shape of nothing": (
        encode(raw(pb.DATA_TYPE_FLOAT32, [0, 2**62, 2**62], b"")),
        INVALID,
        "images.shape",
        f"images: shape (0, {2**62}, {2**62}) is too large",
    ),
    "too many axes": (
        encode(raw(pb.DATA_TYPE_UINT8, [1] * 1000, b"x")),
        INVALID,
        "images.shape",
        "images: shape has 1000 axes; at most 8 are allowed",
    ),
    "no images": (pb.EncodeRequest(model=MNIST), INVALID, "images", "images are missing"),
    "no latents": (pb.DecodeRequest(model=MNIST), INVALID, "latents", "latents are missing"),
    "empty tensor": (encode(pb.Tensor()), INVALID, "images.dtype", "images: dtype is not set; set one of"),
    "NaN image": (
        encode(with_value(GOOD, 3, np.nan)),
        INVALID,
        "images",
        "images row 3 has the value nan; every value must be finite",
    ),
    "infinite image": (
        encode(with_value(GOOD, 4, -np.inf)),
        INVALID,
        "images",
        "images row 4 has the value -inf; every value must be finite",
    ),
    "infinite image of halves": (
        encode(with_value(GOOD.astype(np.float16), 1, np.inf)),
        INVALID,
        "images",
        "images row 1 has the value inf; every value must be finite",
    ),
    "image in 0..255": (
        encode(with_value(GOOD, 2, 254.5)),
        INVALID,
        "images",
        "images row 2 has the value 254.5; float images are in 0..1 (divide by 255, or send uint8)",
    ),
    "negative pixel": (
        encode(with_value(GOOD, 0, -0.25)),
        INVALID,
        "images",
        "images row 0 has the value -0.25; float images are in 0..1 (divide by 255, or send uint8)",
    ),
    "NaN latent": (
        decode(with_value(LATENTS, 1, np.nan)),
        INVALID,
        "latents",
        "latents row 1 has the value nan; every value must be finite",
    ),
    "infinite latent of halves": (
        decode(with_value(LATENTS.astype(np.float16), 2, np.inf)),
        INVALID,
        "latents",
        "latents row 2 has the value inf; every value must be finite",
    ),
    "latent beyond float32 arithmetic": (
        decode(with_value(LATENTS, 3, 3e38)),
        INVALID,
        "latents",
        "row 3 has a latent as large as 3e+38 and its image is not finite; latents are of order 1",
    ),
    "0 images": (
        encode(images(0, 1, 28, 28)),
        INVALID,
        "images",
        "images have 0 rows; one call to model mnist/2 takes 1 to 100 rows",
    ),
    "0 latents": (
        decode(np.zeros((0, 4), np.float32)),
        INVALID,
        "latents",
        "latents have 0 rows; one call to model mnist/2 takes 1 to 100 rows",
    ),
    "too many images": (
        encode(images(101, 1, 28, 28)),
        INVALID,
        "images",
        "images have 101 rows; one call to model mnist/2 takes 1 to 100 rows",
    ),
    "too many latents": (
        decode(np.zeros((101, 4), np.float32)),
        INVALID,
        "latents",
        "latents have 101 rows; one call to model mnist/2 takes 1 to 100 rows",
    ),
    "sample of 0": (
        sample(count=0),
        INVALID,
        "count",
        "count is 0; one call to model mnist/2 takes 1 to 100 rows",
    ),
    "sample of less": (
        sample(count=-(2**31)),
        INVALID,
        "count",
        "count is -2147483648; one call to model mnist/2 takes 1 to 100 rows",
    ),
    "sample of too many": (
        sample(count=2**31 - 1),
        INVALID,
        "count",
        "count is 2147483647; one call to model mnist/2 takes 1 to 100 rows",
    ),
    "negative temperature": (
        sample(temperature=-1),
        INVALID,
        "temperature",
        "temperature is -1.0; it must be finite, at least 0 and at most 3.93e+37",
    ),
    "NaN temperature": (
        sample(temperature=float("nan")),
        INVALID,
        "temperature",
        "temperature is nan; it must be finite",
    ),
    "infinite temperature": (
        sample(temperature=float("inf")),
        INVALID,
        "temperature",
        "temperature is inf; it must be finite",
    ),
    "temperature beyond float32 arithmetic": (
        sample(temperature=3e37),
        INVALID,
        "temperature",
        "row 0 has a latent as large as",
    ),
    # Seeds, because it is the draws' luck whether the prior or the decoder leaves float32 first.
    "temperature beyond the decoder of a fitted prior's latents": (
        sample(model=FACES, prior=pb.PRIOR_FITTED, temperature=3.9e37, seed=0),
        INVALID,
        "temperature",
        "row 0 has a latent as large as",
    ),
    "temperature beyond the fitted prior": (
        sample(model=FACES, prior=pb.PRIOR_FITTED, temperature=3.9e37, count=100, seed=110),
        INVALID,
        "temperature",
        "temperature is so high that the prior's latents are not finite",
    ),
    "unknown prior": (
        sample(prior=9),
        INVALID,
        "prior",
        "prior 9 is not one of PRIOR_UNSPECIFIED, PRIOR_STANDARD_NORMAL, PRIOR_FITTED",
    ),
    "unknown image dtype": (
        sample(image_dtype=9),
        INVALID,
        "image_dtype",
        "image_dtype: dtype 9 is not one of DATA_TYPE_FLOAT32 (1), DATA_TYPE_UINT8 (2), DATA_TYPE_FLOAT16 (3)",
    ),
    "rows past the end of the stream": (
        sample(count=2, first_row=2**64 - 1),
        INVALID,
        "first_row",
        f"first_row is {2**64 - 1} and the call has 2 rows; a seed's stream ends at row 2**64",
    ),
    "no name and several models": (
        sample(model=pb.ModelRef()),
        INVALID,
        "model.name",
        "the request names no model and there are several; name one of faces, mnist",
    ),
    "a version but no name": (
        sample(model=pb.ModelRef(version="1")),
        INVALID,
        "model.name",
        "the request names no model and there are several; name one of faces, mnist",
    ),
    "unknown model": (
        sample(model=pb.ModelRef(name="digits")),
        NOT_FOUND,
        "",
        "there is no model 'digits'; this server has faces, mnist",
    ),
    "a path for a name": (
        pb.GetModelRequest(model=pb.ModelRef(name="../../etc/passwd")),
        NOT_FOUND,
        "",
        "there is no model '../../etc/passwd'; this server has faces, mnist",
    ),
    "a name without end": (
        sample(model=pb.ModelRef(name="x" * 100_000)),
        NOT_FOUND,
        "",
        f"there is no model '{'x' * 64}...'; this server has faces, mnist",
    ),
    "unknown version": (
        encode(GOOD, model=pb.ModelRef(name="mnist", version="3")),
        NOT_FOUND,
        "",
        "model mnist has no version '3' here; this server has 2, 1",
    ),
    "a version that is no number": (
        encode(GOOD, model=pb.ModelRef(name="mnist", version="02")),
        NOT_FOUND,
        "",
        "model mnist has no version '02' here; this server has 2, 1",
    ),
    "no fitted prior": (
        sample(prior=pb.PRIOR_FITTED),
        PRECONDITION,
        "",
        "model mnist/2 has no fitted prior; sample from the standard normal",
    ),
}

METHODS: dict[type[Message], str] = {
    pb.EncodeRequest: "Encode",
    pb.DecodeRequest: "Decode",
    pb.SampleRequest: "Sample",
    pb.GetModelRequest: "GetModel",
}


def failure(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


def details(error: grpc.RpcError) -> dict[str, Any]:
    """Return the google.rpc details by message name, having checked that they repeat code and message."""
    metadata = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    unpacked = {}
    for detail in status.details:
        message = getattr(error_details_pb2, detail.TypeName().rpartition(".")[2])()
        assert detail.Unpack(message)
        unpacked[message.DESCRIPTOR.name] = message
    return unpacked


@pytest.mark.parametrize("kind", TABLE)
def test_bad_input_is_refused_in_words_and_in_details(kind: str, stub: Stub) -> None:
    request, code, field, words = TABLE[kind]
    error = failure(lambda: getattr(stub, METHODS[type(request)])(request))
    assert error.code() == code, error.details()
    assert error.details().startswith(words)
    rich = details(error)
    assert rich["ErrorInfo"].domain == "vaeserve"
    assert rich["ErrorInfo"].reason
    if code == INVALID:
        (violation,) = rich["BadRequest"].field_violations
        assert (violation.field, violation.description) == (field, error.details())


@pytest.mark.parametrize("method", ["Encode", "Decode", "Sample", "GetModel"])
def test_another_models_digest_is_refused_by_every_rpc(method: str, stub: Stub) -> None:
    reference = pb.ModelRef(name="mnist", digest="1" * 64)  # version 1's, but the newest is 2
    requests = {
        "Encode": encode(GOOD, model=reference),
        "Decode": decode(LATENTS, model=reference),
        "Sample": sample(model=reference),
        "GetModel": pb.GetModelRequest(model=reference),
    }
    error = failure(lambda: getattr(stub, method)(requests[method]))
    assert error.code() == PRECONDITION
    assert f"the request is for digest '{'1' * 64}'; model mnist/2 has digest '{'2' * 64}'" in error.details()
    info = details(error)["ErrorInfo"]
    assert (info.reason, dict(info.metadata)) == ("DIGEST_MISMATCH", {"model": "mnist/2", "digest": "2" * 64})


@pytest.mark.parametrize("method", ["Encode", "Decode", "Sample", "GetModel", "ListModels"])
def test_bytes_that_are_no_message_are_refused(method: str, channel: grpc.Channel) -> None:
    call = channel.unary_unary(f"/vaeserve.v1.VaeService/{method}")
    error = failure(lambda: call(b"\xff\xff\xff"))
    assert error.code() == INVALID
    assert error.details() == f"the request's 3 bytes are no {method}Request message"


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/vaeserve.v1.VaeService/Train")
    assert failure(lambda: call(b"")).code() == grpc.StatusCode.UNIMPLEMENTED


def test_an_empty_message_is_a_request_like_any_other(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/vaeserve.v1.VaeService/Encode")
    assert failure(lambda: call(b"")).details().startswith("the request names no model")


def test_uint8_images_have_no_bad_values(stub: Stub) -> None:
    every_value = np.arange(784, dtype=np.uint64).astype(np.uint8).reshape(1, 1, 28, 28)
    assert stub.Encode(encode(every_value)).mean.shape == [1, 4]
