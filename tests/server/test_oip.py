"""The Open Inference Protocol on both transports: tritonclient as it comes, and answers equal to the native ones."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc", reason='the protocol is an extra; pip install "vaeserve[oip]"')

import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

import metrics_page
from bundles import FACES_IMAGE, FACES_LATENT
from oip_calls import FLAVOURS, Triton, add, arrays, inputs, native_arrays, outputs, request, scalars, translated
from serving import RunningServer, running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

SERVICE = "inference.GRPCInferenceService"
FACES, MNIST = pb.ModelRef(name="faces"), pb.ModelRef(name="mnist")
OFFERED = {
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelConfig",
    "RepositoryIndex",
    "ModelInfer",
}
METHODS = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods


@pytest.fixture(scope="module", params=["grpc", "envoy"])
def oip_server(several_models: Path, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    if request.param == "envoy":
        pytest.importorskip("pyvoy")
    with running_server(several_models, oip=True, transport=request.param, max_rows_per_call=100) as running:
        yield running


@pytest.fixture(params=FLAVOURS)
def client(oip_server: RunningServer, request: pytest.FixtureRequest) -> Triton:
    return Triton(request.param, oip_server.target)


@pytest.fixture(scope="module")
def oip_channel(oip_server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(oip_server.target) as opened:
        yield opened


@pytest.fixture(scope="module")
def oip(oip_channel: grpc.Channel) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(oip_channel)


@pytest.fixture(scope="module")
def native(oip_channel: grpc.Channel) -> vae_pb2_grpc.VaeServiceStub:
    return vae_pb2_grpc.VaeServiceStub(oip_channel)


def images(rows: int, dtype: Any, shape: tuple[int, ...] = (1, 28, 28)) -> np.ndarray:
    bytes_ = np.random.default_rng(rows).integers(0, 256, (rows, *shape), np.uint8)
    return bytes_ if dtype == np.uint8 else (bytes_ / np.float32(255)).astype(dtype)


def latents(rows: int, shape: tuple[int, ...] = (4,)) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, *shape), np.float32)


def same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        assert ours[name].tobytes() == array.tobytes()


def test_the_server_and_its_models_are_ready(client: Triton) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for role in ("encoder", "decoder", "sampler"):
        assert client.is_model_ready(f"mnist-{role}")
        assert client.is_model_ready(f"mnist-{role}", "1")
    for name, version in [("mnist-encoder", "3"), ("mnist", ""), ("digits-encoder", ""), ("-encoder", ""), ("", "")]:
        assert not client.is_model_ready(name, version)


def test_metadata_say_what_to_send(client: Triton) -> None:
    server = client.get_server_metadata()
    assert (server.name, list(server.extensions)) == ("vaeserve", ["model_configuration"])
    encoder, decoder, sampler = (client.get_model_metadata(f"faces-{r}") for r in ("encoder", "decoder", "sampler"))

    def ports(tensors: Any) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in tensors]

    image, latent = ("image", "FP32", (-1, *FACES_IMAGE)), ("latent", "FP32", (-1, *FACES_LATENT))
    assert ports(encoder.inputs) == ports(decoder.outputs) == [image]
    assert ports(encoder.outputs) == [("mean", "FP32", latent[2]), ("stddev", "FP32", latent[2])]
    assert ports(decoder.inputs) == [latent]
    assert ports(sampler.inputs) == [("count", "INT32", (1,)), ("seed", "UINT64", (1,))]
    assert ports(sampler.outputs) == [image, latent, ("seed", "UINT64", (1,))]
    assert (encoder.name, list(encoder.versions), encoder.platform) == ("faces-encoder", ["9"], "onnxruntime_onnx")
    assert list(client.get_model_metadata("mnist-decoder", "1").versions) == ["2", "1"]


def test_configurations_say_how_many_rows_and_what_is_optional(client: Triton) -> None:
    encoder = client.get_model_config("faces-encoder").config
    assert (encoder.max_batch_size, list(encoder.input[0].dims)) == (100, list(FACES_IMAGE))
    assert encoder.parameters["digest"].string_value == "d" * 64
    sampler = client.get_model_config("faces-sampler").config
    assert sampler.max_batch_size == 0
    assert [(port.name, list(port.dims), port.optional) for port in sampler.input] == [
        ("count", [1], False),
        ("seed", [1], True),
    ]
    assert [list(port.dims) for port in sampler.output] == [[-1, *FACES_IMAGE], [-1, *FACES_LATENT], [1]]


def test_the_index_lists_every_model_and_version(client: Triton) -> None:
    index = client.get_model_repository_index()
    assert {(model.name, model.version, model.state) for model in index.models} == {
        (f"{name}-{role}", version, "READY")
        for name, version in [("faces", "9"), ("mnist", "2"), ("mnist", "1")]
        for role in ("encoder", "decoder", "sampler")
    }


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.float16])
def test_an_encoder_gives_what_encode_gives(
    client: Triton, native: vae_pb2_grpc.VaeServiceStub, dtype: type[np.generic]
) -> None:
    batch = images(7, dtype)
    answer = client.infer("mnist-encoder", inputs(image=batch), request_id="an id")
    expected = native.Encode(pb.EncodeRequest(model=MNIST, images=tensors.to_tensor(batch)))
    same_bits({name: answer.as_numpy(name) for name in ("mean", "stddev")}, native_arrays(expected))
    response = answer.get_response()
    assert (response.id, response.model_name, response.model_version) == ("an id", "mnist-encoder", "2")
    assert response.parameters["digest"].string_param == "2" * 64


@pytest.mark.parametrize("datatype", ["FP32", "UINT8", "FP16"])
def test_a_decoder_gives_what_decode_gives(client: Triton, native: vae_pb2_grpc.VaeServiceStub, datatype: str) -> None:
    wire = {"FP32": pb.DATA_TYPE_FLOAT32, "UINT8": pb.DATA_TYPE_UINT8, "FP16": pb.DATA_TYPE_FLOAT16}[datatype]
    batch = latents(5, FACES_LATENT)
    answer = client.infer("faces-decoder", inputs(latent=batch), "9", parameters={"image_datatype": datatype})
    expected = native.Decode(pb.DecodeRequest(model=FACES, latents=tensors.to_tensor(batch), image_dtype=wire))
    same_bits({"image": answer.as_numpy("image")}, native_arrays(expected))
    assert answer.get_output("image").datatype == datatype


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, {}),
        ({"temperature": 0.7, "first_row": 2**40}, {"temperature": 0.7, "first_row": 2**40}),
        ({"temperature": 0.0}, {"temperature": 0}),
        ({"prior": pb.PRIOR_FITTED}, {"prior": "fitted"}),
        (
            {"prior": pb.PRIOR_STANDARD_NORMAL, "image_dtype": pb.DATA_TYPE_UINT8},
            {"prior": "standard_normal", "image_datatype": "UINT8"},
        ),
    ],
)
def test_a_sampler_gives_what_sample_gives(
    client: Triton, native: vae_pb2_grpc.VaeServiceStub, fields: dict[str, Any], parameters: dict[str, Any]
) -> None:
    answer = client.infer("faces-sampler", scalars(count=5, seed=2**64 - 1), parameters=parameters)
    expected = native.Sample(pb.SampleRequest(model=FACES, count=5, seed=2**64 - 1, want_latents=True, **fields))
    same_bits({name: answer.as_numpy(name) for name in ("image", "latent")}, native_arrays(expected))
    assert answer.as_numpy("seed").tolist() == [2**64 - 1]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_seed_and_count_may_be_integers_of_any_type_and_scalars(client: Triton, dtype: type[np.integer]) -> None:
    answer = client.infer("mnist-sampler", inputs(seed=np.array([7], dtype), count=np.array(3, dtype)))
    expected = client.infer("mnist-sampler", scalars(count=3, seed=7))
    assert np.array_equal(answer.as_numpy("image"), expected.as_numpy("image"))


def test_a_seed_that_the_server_drew_gives_the_same_again(client: Triton) -> None:
    first = client.infer("mnist-sampler", scalars(count=3))
    (seed,) = first.as_numpy("seed").tolist()
    assert 0 <= seed < 2**53
    again = client.infer("mnist-sampler", scalars(seed=seed, count=3))
    assert np.array_equal(first.as_numpy("image"), again.as_numpy("image"))
    assert client.infer("mnist-sampler", scalars(count=3)).as_numpy("seed").tolist() != [seed]


def test_only_outputs_that_are_asked_for_come_and_in_that_order(client: Triton) -> None:
    answer = client.infer("mnist-sampler", scalars(count=2, seed=7), outputs=outputs("seed", "latent"))
    assert [output.name for output in answer.get_response().outputs] == ["seed", "latent"]
    assert answer.as_numpy("latent").shape == (2, 4)
    assert answer.as_numpy("seed").tolist() == [7]
    assert answer.as_numpy("image") is None


def test_versions_are_models_of_their_own(client: Triton) -> None:
    digests = [
        client.infer("mnist-sampler", scalars(count=1), version).get_response().parameters["digest"].string_param
        for version in ("", "2", "1")
    ]
    assert digests == ["2" * 64, "2" * 64, "1" * 64]
    answer = client.infer("mnist-sampler", scalars(count=1), "1", parameters={"digest": "1" * 64})
    assert answer.get_response().model_version == "1"


def test_compressed_calls_are_taken(client: Triton) -> None:
    batch = images(20, np.uint8)
    plain = client.infer("mnist-encoder", inputs(image=batch))
    packed = client.infer("mnist-encoder", inputs(image=batch), compression_algorithm="gzip")
    assert np.array_equal(packed.as_numpy("mean"), plain.as_numpy("mean"))


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_typed_contents_are_taken_and_answered_as_such(oip: Any, dtype: type[np.generic]) -> None:
    batch = images(3, dtype)
    raw = add(request("mnist-encoder"), "image", "FP32", batch.shape, batch.tobytes())
    raw.inputs[0].datatype = {np.float32: "FP32", np.uint8: "UINT8"}[dtype]  # type: ignore[index]
    typed = request("mnist-encoder")
    place = "fp32_contents" if dtype == np.float32 else "uint_contents"
    add(typed, "image", raw.inputs[0].datatype, batch.shape, **{place: batch.ravel().tolist()})
    expected, answer = arrays(oip.ModelInfer(raw)), oip.ModelInfer(typed)
    assert not answer.raw_output_contents
    for tensor in answer.outputs:
        assert tuple(tensor.shape) == (3, 4)
        assert np.array_equal(np.array(tensor.contents.fp32_contents, np.float32), expected[tensor.name].ravel())


@pytest.mark.parametrize(("datatype", "place"), [("FP32", "fp32_contents"), ("UINT8", "uint_contents"), ("FP16", "")])
def test_typed_answers_have_the_same_values(oip: Any, datatype: str, place: str) -> None:
    parameters = {"image_datatype": datatype}
    typed = add(request("mnist-sampler", "", parameters), "count", "INT32", [1], int_contents=[30])
    add(typed, "seed", "UINT64", [1], uint64_contents=[2**64 - 1])
    answer = oip.ModelInfer(typed)
    raw = add(request("mnist-sampler", "", parameters), "count", "INT32", [1], np.int32(30).tobytes())
    expected = arrays(oip.ModelInfer(add(raw, "seed", "UINT64", [1], np.uint64(2**64 - 1).tobytes())))
    if not place:  # the protocol has no typed contents of this type
        same_bits(arrays(answer), expected)
        return
    image, latent, seed = answer.outputs
    assert np.array_equal(getattr(image.contents, place), expected["image"].ravel())
    assert np.array_equal(np.array(latent.contents.fp32_contents, np.float32), expected["latent"].ravel())
    assert list(seed.contents.uint64_contents) == [2**64 - 1]


def test_a_translated_request_gets_the_native_answer(oip: Any, native: vae_pb2_grpc.VaeServiceStub) -> None:
    asked = pb.SampleRequest(model=FACES, count=4, seed=7, first_row=3, temperature=0.5, want_latents=True)
    ours = arrays(oip.ModelInfer(translated(asked)))
    assert ours.pop("seed").tolist() == [7]
    same_bits(ours, native_arrays(native.Sample(asked)))


def test_a_stream_is_refused_in_words(oip_server: RunningServer) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(oip_server.target) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        result, error = answers.get(timeout=20)
        client.stop_stream()
        assert client.is_server_live()
    assert result is None
    assert "ModelStreamInfer is not offered; every call here is unary; use ModelInfer" in error.message()


@pytest.mark.parametrize("name", [method.name for method in METHODS if method.name not in OFFERED])
def test_what_is_not_offered_is_refused_in_words(oip_channel: grpc.Channel, name: str) -> None:
    call = oip_channel.stream_stream(f"/{SERVICE}/{name}")
    with pytest.raises(grpc.RpcError) as raised:
        list(call(iter([b"", b"\xff"])))
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert raised.value.details().startswith(f"{name} is not offered; ")


def test_tritonclients_own_words_for_what_is_not_offered(client: Triton) -> None:
    with pytest.raises(triton.InferenceServerException, match="the server's figures are on its Prometheus page") as e:
        client.get_inference_statistics("mnist-encoder")
    assert e.value.status() == "StatusCode.UNIMPLEMENTED"


def test_health_and_reflection_name_the_service(oip_channel: grpc.Channel) -> None:
    check = health_pb2_grpc.HealthStub(oip_channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert check.status == health_pb2.HealthCheckResponse.SERVING
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    listed, files = reflection_pb2_grpc.ServerReflectionStub(oip_channel).ServerReflectionInfo(iter(asked))
    assert {"vaeserve.v1.VaeService", SERVICE} <= {found.name for found in listed.list_services_response.service}
    assert files.file_descriptor_response.file_descriptor_proto


def test_without_the_setting_there_is_no_such_service(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(service_pb2.ServerLiveRequest())
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked)
    assert SERVICE not in {found.name for found in listed.list_services_response.service}


def test_calls_are_counted_and_timed_as_the_native_ones_are(oip_server: RunningServer, oip: Any) -> None:
    page = metrics_page.url(oip_server)
    before = metrics_page.read(page)
    batch = images(9, np.uint8)
    asked = add(request("mnist-encoder", "1"), "image", "UINT8", batch.shape, batch.tobytes())
    _, call = oip.ModelInfer.with_call(asked)
    trailers = dict(call.trailing_metadata())
    assert 1 <= int(trailers["vaeserve-batch-rows"]) <= 9
    assert {"vaeserve-call-id", "vaeserve-queue-us", "vaeserve-compute-us"} <= trailers.keys()
    more = {
        ("vaeserve_calls_total", "rpc", "ModelInfer"): 1,
        ("vaeserve_rows_total", "rpc", "ModelInfer"): 9,
        ("vaeserve_latent_rows_total", "model", "mnist"): 9,
    }

    def counted(now: metrics_page.Page) -> dict[tuple[str, str, str], float]:
        return {key: now(key[0], **{key[1]: key[2]}) for key in more}

    first = counted(before)
    metrics_page.read_until(page, lambda now: counted(now) == {key: first[key] + value for key, value in more.items()})
