"""The batcher under a real client and a real model: whatever else goes on, each answer is a direct run of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from bundles import DECODER, ENCODER, read_card, run_directly
from serving import RunningServer, queued_rows, running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import noise

CALLS = 250
EXCUSED = {"cancel": grpc.StatusCode.CANCELLED, "expire": grpc.StatusCode.DEADLINE_EXCEEDED}


@pytest.fixture(scope="module", params=[{"threads": 1, "max_batch_rows": 8}, {"threads": 3}])
def server(models_dir: Path, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with running_server(models_dir, **request.param) as running:
        yield running


def test_each_answer_is_a_direct_run_of_its_rows(
    server: RunningServer, bundle_dir: Path, test_images: NDArray[np.uint8]
) -> None:
    random = np.random.default_rng(1)
    calls = []
    with grpc.insecure_channel(server.target) as channel:
        stub = vae_pb2_grpc.VaeServiceStub(channel)
        for seed in range(CALLS):
            images = random.choice(test_images, int(random.choice([1, 1, 1, 2, 7, 40])))
            tensor = tensors.to_tensor(images if random.random() < 0.5 else images / np.float32(255))
            fate = str(random.choice(["wait", "wait", "wait", "cancel", "expire"]))
            call = stub.Encode.future(
                pb.EncodeRequest(images=tensor, want_latents=True, seed=seed, first_row=seed),
                timeout=random.uniform(0, 0.05) if fate == "expire" else 60,
            )
            calls.append((images, fate, call))
            if fate == "cancel" and random.random() < 0.5:
                call.cancel()
        for _, fate, call in calls:
            if fate == "cancel":
                call.cancel()
        answered = 0
        for seed, (images, fate, call) in enumerate(calls):
            if call.code() != grpc.StatusCode.OK:
                assert call.code() == EXCUSED.get(fate), call.details()
                continue
            answered += 1
            _check(call.result(), images, seed, bundle_dir)
    assert answered >= CALLS / 3
    if isinstance(server, RunningServer):  # behind Envoy it is another process
        server.until(lambda running: queued_rows(running) == 0)


def _check(answer: pb.EncodeResponse, images: NDArray[np.uint8], seed: int, bundle_dir: Path) -> None:
    mean, stddev, latents = (
        tensors.from_tensor(tensor).astype(np.float32) for tensor in (answer.mean, answer.stddev, answer.latents)
    )
    direct_mean, direct_stddev = run_directly(bundle_dir, ENCODER, images / np.float32(255))
    tolerance = card_tolerance(bundle_dir, ENCODER)
    np.testing.assert_allclose(mean, direct_mean, rtol=0, atol=tolerance)
    np.testing.assert_allclose(stddev, direct_stddev, rtol=0, atol=tolerance)
    drawn = noise.standard_normal(seed, seed, *mean.shape)
    assert np.array_equal(latents, drawn * stddev + mean)  # the noise is the same bits under any batching


def card_tolerance(bundle_dir: Path, role: int) -> float:
    """Return how far the answers for a row in two batches may be apart, by what the card says of each."""
    (graph,) = (graph for graph in read_card(bundle_dir).graphs if graph.role == role)
    assert graph.parity
    return max(2 * parity.max_abs_error + parity.max_batch_error for parity in graph.parity)


def test_samples_decoded_together_are_those_decoded_alone(server: RunningServer, bundle_dir: Path) -> None:
    counts = [1, 3, 1, 64, 1, 100, 2]
    with grpc.insecure_channel(server.target) as channel:
        stub = vae_pb2_grpc.VaeServiceStub(channel)
        calls = [
            stub.Sample.future(pb.SampleRequest(count=count, seed=5, want_latents=True, image_dtype=pb.DATA_TYPE_UINT8))
            for count in counts
        ]
        answers = [call.result() for call in calls]
    size = int(np.prod(answers[0].latents.shape[1:]))
    latents = noise.standard_normal(5, 0, max(counts), size)
    (images,) = run_directly(bundle_dir, DECODER, latents)
    for count, answer in zip(counts, answers, strict=True):
        assert np.array_equal(tensors.from_tensor(answer.latents), latents[:count])
        levels = tensors.from_tensor(answer.images).astype(np.float64)
        assert np.abs(levels - images[:count].astype(np.float64) * 255).max() <= 0.5 + 255 * card_tolerance(
            bundle_dir, DECODER
        )
