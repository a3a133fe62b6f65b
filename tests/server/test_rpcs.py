"""The five RPCs over real gRPC, with the ordinary generated stub: what they answer to good calls."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from bundles import DECODER, ENCODER, FACES_IMAGE, FACES_LATENT, PRIOR, read_card, run_directly
from serving import RunningServer, running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import noise

Stub = vae_pb2_grpc.VaeServiceStub
FACES = pb.ModelRef(name="faces")
MNIST = pb.ModelRef(name="mnist")


def uint8_images(rows: int, shape: tuple[int, ...] = (1, 28, 28)) -> NDArray[np.uint8]:
    return np.random.default_rng(rows).integers(0, 256, (rows, *shape), np.uint8)


def test_encode_gives_mean_and_standard_deviation(stub: Stub, several_models: Path) -> None:
    images = uint8_images(5)
    answer = stub.Encode(pb.EncodeRequest(model=MNIST, images=tensors.to_tensor(images)))
    mean, stddev = run_directly(several_models / "mnist/2", ENCODER, images / np.float32(255))
    assert (answer.model.name, answer.model.version, answer.model.digest) == ("mnist", "2", "2" * 64)
    np.testing.assert_allclose(tensors.from_tensor(answer.mean), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tensors.from_tensor(answer.stddev), stddev, rtol=1e-5)
    assert not answer.HasField("latents")
    assert not answer.HasField("seed")


def test_images_of_any_type_mean_the_same(stub: Stub) -> None:
    images = (uint8_images(4, FACES_IMAGE) & 0xF0).astype(np.uint8)  # values that float16 nearly holds

    def mean(array: NDArray[np.generic]) -> NDArray[np.generic]:
        return tensors.from_tensor(stub.Encode(pb.EncodeRequest(model=FACES, images=tensors.to_tensor(array))).mean)

    scaled = images / np.float32(255)
    assert mean(images).shape == (4, *FACES_LATENT)
    assert np.array_equal(mean(images), mean(scaled))
    np.testing.assert_allclose(mean(scaled.astype(np.float16)), mean(scaled), atol=2e-3)


def test_encode_draws_latents_by_the_seed_contract(stub: Stub) -> None:
    request = pb.EncodeRequest(
        model=FACES, images=tensors.to_tensor(uint8_images(3, FACES_IMAGE)), want_latents=True, seed=7, first_row=2**40
    )
    answer = stub.Encode(request)
    mean, stddev = tensors.from_tensor(answer.mean), tensors.from_tensor(answer.stddev)
    expected = noise.standard_normal(7, 2**40, 3, 32).reshape(3, *FACES_LATENT) * stddev + mean
    assert np.array_equal(tensors.from_tensor(answer.latents), expected)
    assert answer.seed == 7


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_a_given_seed_is_used_and_returned_even_if_zero(stub: Stub, seed: int) -> None:
    assert stub.Sample(pb.SampleRequest(model=MNIST, count=1, seed=seed)).seed == seed


def test_without_a_seed_the_server_draws_one_that_gives_the_same_rows_again(stub: Stub) -> None:
    first = stub.Sample(pb.SampleRequest(model=MNIST, count=3, want_latents=True))
    again = stub.Sample(pb.SampleRequest(model=MNIST, count=3, want_latents=True, seed=first.seed))
    other = stub.Sample(pb.SampleRequest(model=MNIST, count=3, want_latents=True))
    assert first.seed < 2**53
    assert again.latents == first.latents
    assert other.latents != first.latents


def test_sample_decodes_standard_normal_latents(stub: Stub, several_models: Path) -> None:
    answer = stub.Sample(pb.SampleRequest(model=MNIST, count=4, seed=5, want_latents=True))
    latents = noise.standard_normal(5, 0, 4, 4)
    assert np.array_equal(tensors.from_tensor(answer.latents), latents)
    (images,) = run_directly(several_models / "mnist/2", DECODER, latents)
    np.testing.assert_allclose(tensors.from_tensor(answer.images), images, rtol=1e-5, atol=1e-6)
    assert not stub.Sample(pb.SampleRequest(model=MNIST, count=1)).HasField("latents")


def test_a_sample_cut_in_pieces_equals_the_whole(stub: Stub) -> None:
    def sample(count: int, first_row: int = 0) -> NDArray[np.generic]:
        answer = stub.Sample(pb.SampleRequest(model=MNIST, count=count, seed=7, first_row=first_row, want_latents=True))
        return tensors.from_tensor(answer.latents)

    whole = sample(100)
    assert np.array_equal(whole[:4], sample(4))
    assert np.array_equal(whole[30:100], sample(70, first_row=30))


def test_temperature_scales_the_noise(stub: Stub) -> None:
    def latents(temperature: float) -> NDArray[np.generic]:
        request = pb.SampleRequest(model=MNIST, count=3, seed=1, temperature=temperature, want_latents=True)
        return tensors.from_tensor(stub.Sample(request).latents)

    assert not latents(0.0).any()
    assert np.array_equal(latents(0.5), latents(1.0) * np.float32(0.5))


def test_a_fitted_prior_takes_the_scaled_base_noise(stub: Stub, several_models: Path) -> None:
    request = pb.SampleRequest(model=FACES, count=70, seed=3, temperature=0.5, prior=pb.PRIOR_FITTED, want_latents=True)
    answer = stub.Sample(request)
    base = noise.standard_normal(3, 0, 70, 32).reshape(70, *FACES_LATENT) * np.float32(0.5)
    (latents,) = run_directly(several_models / "faces/9", PRIOR, base)
    np.testing.assert_allclose(tensors.from_tensor(answer.latents), latents, rtol=1e-6)
    (images,) = run_directly(several_models / "faces/9", DECODER, latents)
    np.testing.assert_allclose(tensors.from_tensor(answer.images), images, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("image_dtype", "expected"),
    [
        (pb.DATA_TYPE_UNSPECIFIED, np.float32),
        (pb.DATA_TYPE_FLOAT32, np.float32),
        (pb.DATA_TYPE_FLOAT16, np.float16),
        (pb.DATA_TYPE_UINT8, np.uint8),
    ],
)
def test_decode_answers_in_the_type_asked_for(
    stub: Stub, several_models: Path, image_dtype: int, expected: type[np.generic]
) -> None:
    latents = np.random.default_rng(0).standard_normal((6, *FACES_LATENT)).astype(np.float32)
    request = pb.DecodeRequest(model=FACES, latents=tensors.to_tensor(latents), image_dtype=image_dtype)  # type: ignore[arg-type]
    images = tensors.from_tensor(stub.Decode(request).images)
    (exact,) = run_directly(several_models / "faces/9", DECODER, latents)
    assert images.dtype == expected
    assert images.shape == (6, *FACES_IMAGE)
    if expected == np.uint8:
        assert np.abs(images - exact * 255).max() <= 0.5 + 1e-3
    else:
        np.testing.assert_allclose(images, exact, atol=1e-6 if expected == np.float32 else 1e-3)


def test_float16_latents_decode_as_the_float32_they_stand_for(stub: Stub) -> None:
    half = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)

    def decode(latents: NDArray[np.generic]) -> pb.Tensor:
        return stub.Decode(pb.DecodeRequest(model=MNIST, latents=tensors.to_tensor(latents))).images

    assert decode(half) == decode(half.astype(np.float32))


def test_a_call_larger_than_a_run_gets_its_rows_in_order(several_models: Path) -> None:
    images = uint8_images(300)
    with (
        running_server(several_models, max_batch_rows=32, threads=3) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        answer = Stub(channel).Encode(pb.EncodeRequest(model=MNIST, images=tensors.to_tensor(images)))
    mean, _ = run_directly(several_models / "mnist/2", ENCODER, images / np.float32(255))
    np.testing.assert_allclose(tensors.from_tensor(answer.mean), mean, rtol=1e-5, atol=1e-6)


def test_an_older_version_answers_to_its_number_and_the_newest_to_none(stub: Stub) -> None:
    versions = {
        wanted: stub.GetModel(pb.GetModelRequest(model=pb.ModelRef(name="mnist", version=wanted))).card.version
        for wanted in ("", "1", "2")
    }
    assert versions == {"": "2", "1": "1", "2": "2"}


def test_the_right_digest_is_accepted(stub: Stub) -> None:
    reference = pb.ModelRef(name="mnist", version="1", digest="1" * 64)
    assert stub.Sample(pb.SampleRequest(model=reference, count=1)).model == reference


def test_models_are_listed_by_name_and_then_newest_first(stub: Stub, several_models: Path) -> None:
    models = stub.ListModels(pb.ListModelsRequest()).models
    assert [(model.card.name, model.card.version) for model in models] == [
        ("faces", "9"),
        ("mnist", "2"),
        ("mnist", "1"),
    ]
    assert models[0].card == read_card(several_models / "faces/9")
    assert models[0].serving == pb.Serving(
        provider="CPUExecutionProvider",
        requested_device="cpu",
        fell_back_to_cpu=False,
        max_rows_per_call=100,
        precision=pb.DATA_TYPE_FLOAT32,
    )


def test_only_the_newest_versions_are_served_and_numbers_are_compared_as_numbers(
    several_models: Path, tmp_path: Path
) -> None:
    for version in ("2", "10", "9"):
        _republish(several_models / "mnist/2", tmp_path / "mnist" / version)
    with running_server(tmp_path, versions=2) as server, grpc.insecure_channel(server.target) as channel:
        listed = Stub(channel).ListModels(pb.ListModelsRequest()).models
    assert [model.card.version for model in listed] == ["10", "9"]


def test_the_only_model_needs_no_name(models_dir: Path, test_images: NDArray[np.uint8]) -> None:
    with running_server(models_dir) as server, grpc.insecure_channel(server.target) as channel:
        stub = Stub(channel)
        encoded = stub.Encode(pb.EncodeRequest(images=tensors.to_tensor(test_images)))
        decoded = stub.Decode(pb.DecodeRequest(model=encoded.model, latents=encoded.mean))
    assert encoded.model.name == "mnist"
    originals, reconstructions = test_images / 255, tensors.from_tensor(decoded.images)
    # Another image's reconstruction is further away than one's own, nearly always: the road carries real content.
    own = ((originals - reconstructions) ** 2).mean(axis=(1, 2, 3))
    others = ((originals - np.roll(reconstructions, 1, axis=0)) ** 2).mean(axis=(1, 2, 3))
    assert (own < others).mean() > 0.9


def test_nothing_is_answered_about_a_graph_that_auto_did_not_find(several_models: Path) -> None:
    with running_server(several_models, device="auto") as server, grpc.insecure_channel(server.target) as channel:
        serving = Stub(channel).GetModel(pb.GetModelRequest(model=MNIST)).serving
    assert serving.requested_device == "auto"
    assert serving.fell_back_to_cpu == (serving.provider == "CPUExecutionProvider" and _has_gpu_build())


def test_compressed_calls_are_answered(stub: Stub) -> None:
    request = pb.EncodeRequest(model=MNIST, images=tensors.to_tensor(np.zeros((2, 1, 28, 28), np.uint8)))
    assert stub.Encode(request, compression=grpc.Compression.Gzip) == stub.Encode(request)


def test_a_second_server_answers_the_same(server: RunningServer, several_models: Path, stub: Stub) -> None:
    request = pb.SampleRequest(model=MNIST, count=5, seed=9, want_latents=True)
    with running_server(several_models) as other, grpc.insecure_channel(other.target) as channel:
        assert Stub(channel).Sample(request).latents == stub.Sample(request).latents


def _republish(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    card = (target / "model.json").read_text().replace('"version": "2"', f'"version": "{target.name}"')
    (target / "model.json").write_text(card)


def _has_gpu_build() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
