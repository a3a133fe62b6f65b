"""What callers of the Open Inference Protocol get wrong: native statuses in native words, and a server that goes on."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tritonclient.grpc", reason='the protocol is an extra; pip install "vaeserve[oip]"')

from google.rpc import error_details_pb2, status_pb2
from tritonclient.grpc import service_pb2, service_pb2_grpc

import serving
from oip_calls import add, request, translated
from serving import running_server
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
EXPIRED = grpc.StatusCode.DEADLINE_EXCEEDED  # a timeout of few microseconds, if asked for
TABLE = runpy.run_path(str(Path(__file__).parent / "test_bad_input.py"))["TABLE"]
SHAPE, IMAGE = [1, 1, 28, 28], bytes(784 * 4)
OFFERED = [
    *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "RepositoryIndex"),
    "ModelInfer",
]
# The protocol has other words for a model, a datatype and a prior, and no model without a name.
ITS_OWN = {
    "no dtype",
    "unknown dtype",
    "empty tensor",
    "unknown prior",
    "unknown image dtype",
    "no name and several models",
    "a version but no name",
    "unknown model",
    "a path for a name",
    "a name without end",
}


@pytest.fixture(scope="module")
def target(several_models: Path) -> Iterator[str]:
    with running_server(several_models, oip=True, max_rows_per_call=100) as server:
        yield server.target


@pytest.fixture(scope="module")
def channel(target: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(target) as opened:
        yield opened


@pytest.fixture(scope="module")
def oip(channel: grpc.Channel) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(autouse=True)
def _goes_on(oip: Any) -> Iterator[None]:
    """Whatever a test sent, the next good call succeeds."""
    yield
    answer = oip.ModelInfer(add(request("mnist-sampler"), "count", "INT32", [1], int_contents=[1]))
    assert answer.outputs[0].shape == [1, 1, 28, 28]


def image(datatype: str = "FP32", shape: Any = SHAPE, raw: bytes | None = None, **contents: Any) -> Any:
    return add(request("mnist-encoder"), "image", datatype, shape, raw, **contents)


def sample(count: Any = 1, parameters: Any = None, **seed: Any) -> Any:
    made = add(request("mnist-sampler", "", parameters), "count", "INT32", [1], int_contents=[count])
    return add(made, "seed", "INT64", [1], **seed) if seed else made


def but(made: Any, **changes: Any) -> Any:
    """Return the request after a change that no helper makes."""
    for name, value in changes.items():
        getattr(made, name).extend(value)
    return made


def with_parameter(place: Any, made: Any, name: str) -> Any:
    place.parameters[name].string_param = "x"
    return made


def asking(*names: str) -> Any:
    made = image(raw=IMAGE)
    for name in names:
        made.outputs.add(name=name)
    return made


def classifying() -> Any:
    made = asking("mean")
    return with_parameter(made.outputs[0], made, "classification")


def shared() -> Any:
    made = image()
    return with_parameter(made.inputs[0], made, "shared_memory_region")


def shared_output() -> Any:
    made = asking("mean")
    return with_parameter(made.outputs[0], made, "shared_memory_region")


MNIST = ", ".join(f"{name}-{role}" for name in ("faces", "mnist") for role in ("encoder", "decoder", "sampler"))
OWN_TABLE: dict[str, tuple[Any, grpc.StatusCode, str, str]] = {
    "unknown model": (
        request("digits-encoder"),
        NOT_FOUND,
        "",
        f"there is no model 'digits-encoder'; this server has {MNIST}",
    ),
    "a native name": (request("mnist"), NOT_FOUND, "", "there is no model 'mnist'; this server has faces-encoder, "),
    "an unknown role": (request("mnist-prior"), NOT_FOUND, "", "there is no model 'mnist-prior'"),
    "no name": (request(""), NOT_FOUND, "", "there is no model ''"),
    "a role alone": (request("-encoder"), NOT_FOUND, "", "there is no model '-encoder'"),
    "a path": (request("../mnist-encoder"), NOT_FOUND, "", "there is no model '../mnist-encoder'"),
    "a name without end": (request("x" * 10_000), NOT_FOUND, "", f"there is no model '{'x' * 64}...'; "),
    "unknown version": (request("mnist-encoder", "3"), NOT_FOUND, "", "model mnist has no version '3' here; "),
    "no input": (request("mnist-encoder"), INVALID, "inputs.image", "images are missing"),
    "no count": (request("mnist-sampler"), INVALID, "inputs.count", "count is missing"),
    "unknown input": (
        add(request("mnist-encoder"), "images", "FP32", SHAPE, IMAGE),
        INVALID,
        "inputs",
        "input 'images' is not one of image",
    ),
    "an input twice": (
        add(image(raw=IMAGE), "image", "FP32", SHAPE, IMAGE),
        INVALID,
        "inputs",
        "input image is there twice",
    ),
    "fewer raw contents": (
        add(image(raw=IMAGE), "image", "FP32", SHAPE),
        INVALID,
        "raw_input_contents",
        "there are 1 raw_input_contents and 2 inputs; send one for each input, or none and typed contents",
    ),
    "more raw contents": (
        but(image(raw=IMAGE), raw_input_contents=[IMAGE]),
        INVALID,
        "raw_input_contents",
        "there are 2 raw_input_contents and 1 inputs",
    ),
    "raw and typed": (
        image(raw=IMAGE, fp32_contents=[0.0] * 784),
        INVALID,
        "inputs.image.contents",
        "images: contents are there twice, raw and typed; send one of them",
    ),
    "no contents": (
        image(),
        INVALID,
        "inputs.image.data",
        "images: data has 0 bytes; shape (1, 1, 28, 28) of float32 takes 3136",
    ),
    "too few typed": (
        image(fp32_contents=[0.0] * 783),
        INVALID,
        "inputs.image.data",
        "images: data has 3132 bytes; shape (1, 1, 28, 28) of float32 takes 3136",
    ),
    "typed in another place": (
        image(fp64_contents=[0.0] * 784),
        INVALID,
        "inputs.image.contents",
        "images: FP32 is in fp64_contents; it belongs into fp32_contents",
    ),
    "typed in two places": (
        image(fp32_contents=[0.0] * 784, bytes_contents=[b"x"]),
        INVALID,
        "inputs.image.contents",
        "images: FP32 is in bytes_contents; it belongs into fp32_contents",
    ),
    "typed halves": (
        image("FP16", fp32_contents=[0.0] * 784),
        INVALID,
        "inputs.image.contents",
        "images: FP16 has no typed contents; send raw_input_contents",
    ),
    "a typed byte of 256": (
        image("UINT8", uint_contents=[0] * 783 + [256]),
        INVALID,
        "inputs.image.contents",
        "images: uint_contents have a value outside 0 to 255",
    ),
    "strings": (
        image("BYTES", bytes_contents=[b"x"] * 784),
        INVALID,
        "inputs.image.datatype",
        "images: datatype 'BYTES' is not one of UINT8, UINT16, UINT32, UINT64, INT8, INT16, INT32, INT64, FP16, ",
    ),
    "no datatype": (image("", raw=IMAGE), INVALID, "inputs.image.datatype", "images: datatype '' is not one of"),
    "doubles": (
        image("FP64", raw=bytes(784 * 8)),
        INVALID,
        "inputs.image",
        "images are float64; model mnist/2 takes uint8 or float32 or float16",
    ),
    "unknown output": (asking("mean", "variance"), INVALID, "outputs", "output 'variance' is not one of mean, stddev"),
    "count of floats": (
        add(request("mnist-sampler"), "count", "FP32", [1], fp32_contents=[3.0]),
        INVALID,
        "inputs.count",
        "count is float32 of shape (1,); send one integer, of shape (1,)",
    ),
    "two counts": (
        add(request("mnist-sampler"), "count", "INT32", [2], int_contents=[3, 4]),
        INVALID,
        "inputs.count",
        "count is int32 of shape (2,); send one integer, of shape (1,)",
    ),
    "a count beyond 32 bits": (
        add(request("mnist-sampler"), "count", "INT64", [1], int64_contents=[2**40]),
        INVALID,
        "inputs.count",
        f"count is {2**40}; one call to model mnist/2 takes 1 to 100 rows",
    ),
    "negative seed": (sample(int64_contents=[-1]), INVALID, "inputs.seed", "seed is -1; it must be 0 to 2**64 - 1"),
    "a stranger's parameter": (
        sample(parameters={"temprature": 0.5}),
        INVALID,
        "parameters",
        "parameter 'temprature' is not one that mnist-sampler takes: digest, timeout, image_datatype, first_row, "
        "temperature, prior",
    ),
    "a sequence": (
        sample(parameters={"sequence_id": 3}),
        INVALID,
        "parameters",
        "parameter 'sequence_id' is not one that mnist-sampler takes",
    ),
    "temperature in words": (
        sample(parameters={"temperature": "hot"}),
        INVALID,
        "parameters.temperature",
        "parameter temperature is 'hot'; it must be a number",
    ),
    "temperature of truth": (
        sample(parameters={"temperature": True}),
        INVALID,
        "parameters.temperature",
        "parameter temperature is 'True'; it must be a number",
    ),
    "temperature beyond float32": (
        sample(parameters={"temperature": 1e300}),
        INVALID,
        "parameters.temperature",
        "temperature is inf; it must be finite",
    ),
    "another prior": (
        sample(parameters={"prior": "flat"}),
        INVALID,
        "parameters.prior",
        "parameter prior is 'flat'; it must be one of standard_normal, fitted",
    ),
    "another image datatype": (
        sample(parameters={"image_datatype": "FP64"}),
        INVALID,
        "parameters.image_datatype",
        "parameter image_datatype is 'FP64'; it must be one of FP32, UINT8, FP16",
    ),
    "a digest that is no string": (
        sample(parameters={"digest": 7}),
        INVALID,
        "parameters.digest",
        "parameter digest is '7'; it must be a string",
    ),
    "classification": (classifying(), UNIMPLEMENTED, "", "classification is not offered"),
    "shared memory": (shared(), UNIMPLEMENTED, "", "shared memory is not offered; send tensors with the request"),
    "shared memory for an answer": (shared_output(), UNIMPLEMENTED, "", "shared memory is not offered"),
    "65 KB of empty inputs": (
        request("mnist-encoder", inputs=[service_pb2.ModelInferRequest.InferInputTensor()] * 33_000),
        INVALID,
        "",
        "the request has more than 1024 fields in its tensors",
    ),
    "a megabyte of typed bytes": (
        image("UINT8", [2000, 1, 28, 28], uint_contents=[7] * (2000 * 784)),
        INVALID,
        "",
        "the request has 1568048 bytes beside raw_input_contents and fp32_contents; at most 1048576 are taken: send",
    ),
    "a megabyte of a name": (request("x" * 2**21), INVALID, "", "the request has 2097157 bytes beside"),
}


def failure(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return raised.value


def violation(error: grpc.RpcError) -> str:
    """Return the field that the error's details name, '' if they name none."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    bad = error_details_pb2.BadRequest()
    found = [detail for detail in status.details if detail.Unpack(bad)]
    return bad.field_violations[0].field if found else ""


@pytest.mark.parametrize("kind", [kind for kind in TABLE if kind not in ITS_OWN])
def test_the_native_errors_are_here_in_the_same_words(kind: str, channel: grpc.Channel, oip: Any) -> None:
    native_request, code, _, words = TABLE[kind]
    if isinstance(native_request, pb.SampleRequest) and not native_request.HasField("seed"):
        native_request = pb.SampleRequest.FromString(native_request.SerializeToString())
        native_request.seed = 7
    stub = vae_pb2_grpc.VaeServiceStub(channel)
    methods = {pb.EncodeRequest: stub.Encode, pb.DecodeRequest: stub.Decode, pb.SampleRequest: stub.Sample}
    native = failure(lambda: methods[type(native_request)](native_request))  # type: ignore[index]
    error = failure(lambda: oip.ModelInfer(translated(native_request)))
    assert error.code() == native.code() == code
    assert error.details().startswith(words)
    assert error.details() == native.details()
    assert violation(error).startswith(("inputs.", "parameters.")) == (code == INVALID)


@pytest.mark.parametrize("kind", OWN_TABLE)
def test_what_only_this_protocol_can_get_wrong_is_told(kind: str, oip: Any) -> None:
    asked, code, field, words = OWN_TABLE[kind]
    error = failure(lambda: oip.ModelInfer(asked))
    assert error.code() == code, error.details()
    assert error.details().startswith(words)
    assert violation(error) == field


@pytest.mark.parametrize("role", ["encoder", "decoder", "sampler"])
def test_another_models_digest_is_refused(role: str, oip: Any) -> None:
    error = failure(lambda: oip.ModelInfer(request(f"mnist-{role}", "", {"digest": "1" * 64})))
    assert error.code() == PRECONDITION
    assert f"the request is for digest '{'1' * 64}'; model mnist/2 has digest '{'2' * 64}'" in error.details()


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig"])
def test_what_is_asked_of_unknown_models_is_not_found(method: str, oip: Any) -> None:
    asked = getattr(service_pb2, f"{method}Request")
    assert failure(lambda: getattr(oip, method)(asked(name="digits-encoder"))).code() == NOT_FOUND
    assert failure(lambda: getattr(oip, method)(asked(name="mnist-encoder", version="3"))).code() == NOT_FOUND


@pytest.mark.parametrize("method", OFFERED)
@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"\xff" * 70_000], ids=["short", "long"])
def test_bytes_that_are_no_message_are_refused(method: str, payload: bytes, channel: grpc.Channel) -> None:
    error = failure(lambda: channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(payload))  # type: ignore[call-arg]
    assert error.code() == INVALID
    assert error.details() == f"the request's {len(payload)} bytes are no {method}Request message"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from Linux' /proc")
def test_a_message_that_would_become_a_gigabyte_is_never_parsed(channel: grpc.Channel) -> None:
    if serving.default_transport == "envoy":
        pytest.skip("looks at this process's memory")

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")  # type: ignore[call-arg]
    before = resident_bytes()
    assert failure(lambda: call(b"\x2a\x00" * (15 * 2**20))).code() == INVALID
    assert resident_bytes() - before < 500 * 2**20  # the message itself a few times, not 1.4 GB
    assert np.isfinite(before)


_NAMES = st.sampled_from(["mnist-encoder", "faces-decoder", "faces-sampler", "mnist-sampler", "mnist", "", "é\0"])
_NUMBERS = st.integers(-(2**31), 2**31 - 1)
_PARAMETERS = st.dictionaries(
    st.sampled_from(["digest", "timeout", "image_datatype", "first_row", "temperature", "prior", "other"]),
    st.one_of(
        st.builds(service_pb2.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)),
        st.builds(service_pb2.InferParameter, uint64_param=st.integers(0, 2**64 - 1)),
        st.builds(service_pb2.InferParameter, double_param=st.floats()),
        st.builds(
            service_pb2.InferParameter, string_param=st.sampled_from(["", "fitted", "UINT8", "d" * 64, "x" * 99])
        ),
        st.builds(service_pb2.InferParameter, bool_param=st.booleans()),
        st.just(service_pb2.InferParameter()),
    ),
    max_size=3,
)
_CONTENTS = st.one_of(
    st.none(),
    st.builds(service_pb2.InferTensorContents, fp32_contents=st.lists(st.floats(width=32), max_size=9)),
    st.builds(service_pb2.InferTensorContents, int_contents=st.lists(_NUMBERS, max_size=2)),
    st.builds(service_pb2.InferTensorContents, uint64_contents=st.lists(st.integers(0, 2**64 - 1), max_size=2)),
)
_INPUTS = st.lists(
    st.builds(
        service_pb2.ModelInferRequest.InferInputTensor,
        name=st.sampled_from(["image", "latent", "count", "seed", "other"]),
        datatype=st.sampled_from(["FP32", "FP16", "UINT8", "INT32", "INT64", "UINT64", "BOOL", "BYTES", ""]),
        shape=st.lists(st.sampled_from([-1, 0, 1, 2, 4, 28, 2**40, 2**63 - 1]), max_size=5),
        contents=_CONTENTS,
    ),
    max_size=3,
)
_OUTPUTS = st.lists(
    st.builds(
        service_pb2.ModelInferRequest.InferRequestedOutputTensor,
        name=st.sampled_from(["mean", "stddev", "image", "latent", "seed", "other"]),
    ),
    max_size=3,
)
_REQUESTS = st.builds(
    service_pb2.ModelInferRequest,
    model_name=_NAMES,
    model_version=st.sampled_from(["", "1", "-1", "x"]),
    id=st.text(max_size=3),
    parameters=_PARAMETERS,
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    raw_input_contents=st.lists(st.binary(max_size=9), max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(_REQUESTS)
def test_whatever_is_asked_the_server_never_breaks(oip: Any, asked: Any) -> None:
    try:
        answer = oip.ModelInfer(asked, timeout=30)
    except grpc.RpcError as error:
        assert error.code() in {INVALID, NOT_FOUND, PRECONDITION, EXPIRED}, error.details()
    else:
        assert answer.id == asked.id
