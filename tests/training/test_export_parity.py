"""The gate between PyTorch and ONNX Runtime: what it measures, on which inputs, and what it stops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from vaeserve_training import bundle, checkpoint, parity
from vaeserve_training.checkpoint import Checkpoint
from vaeserve_training.onnx_graphs import ExportError


@pytest.fixture(scope="module")
def model(checkpoint_dir: Path) -> Checkpoint:
    return checkpoint.load(checkpoint_dir)


@pytest.fixture(scope="module")
def decoder(bundle_dir: Path) -> bytes:
    return (bundle_dir / bundle.DECODER_FILE).read_bytes()


class Shifted(nn.Module):
    """The decoder, a little off."""

    def __init__(self, decoder: nn.Module, by: float) -> None:
        super().__init__()
        self.decoder, self.by = decoder, by

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.decoder(latent) + self.by
        return image


@pytest.fixture(scope="module")
def latents(model: Checkpoint, test_images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.no_grad():
        means = model.vae.encoder(torch.from_numpy((test_images / 255).astype(np.float32)))[0].numpy()
    return parity.latent_inputs(means)


@pytest.fixture
def few_latents(latents: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> NDArray[np.float32]:
    """Some of every kind, for three batch sizes."""
    monkeypatch.setattr(parity, "BATCH_SIZES", (1, 8, 64))
    return latents[::7]


def test_what_is_recorded_is_the_largest_difference(
    model: Checkpoint, decoder: bytes, latents: NDArray[np.float32]
) -> None:
    (equal, *_) = parity.measure("decoder.onnx", decoder, model.vae.decoder, latents)
    (off, *_) = parity.measure("decoder.onnx", decoder, Shifted(model.vae.decoder, 8e-6), latents)
    assert 0 < equal.max_abs_error < 4e-6
    assert off.max_abs_error == pytest.approx(8e-6, abs=equal.max_abs_error + 1e-7)
    assert off.max_rel_error > equal.max_rel_error


@pytest.mark.parametrize(("by", "given"), [(3e-5, ""), (-3e-5, ""), (float("nan"), "nan "), (float("inf"), "inf ")])
def test_a_graph_that_is_off_is_stopped_and_named(
    by: float, given: str, model: Checkpoint, decoder: bytes, few_latents: NDArray[np.float32]
) -> None:
    where = r"decoder\.onnx on CPUExecutionProvider: output image at batch size 1 is "
    with pytest.raises(ExportError, match=rf"{where}.* where PyTorch gives {given}.*\(input row \d+\); allowed are"):
        parity.measure("decoder.onnx", decoder, Shifted(model.vae.decoder, by), few_latents)


def test_the_inputs_are_what_the_gate_promises(latents: NDArray[np.float32], test_images: NDArray[np.uint8]) -> None:
    images = parity.image_inputs(test_images)
    assert images.shape == (parity.ROWS, 1, 28, 28)
    assert latents.shape == (parity.ROWS, 20)
    assert all(parity.ROWS % size == 0 for size in parity.BATCH_SIZES)
    rows = {row.tobytes() for row in images}
    assert {np.zeros_like(images[0]).tobytes(), np.ones_like(images[0]).tobytes()} <= rows
    assert {(image / 255).astype(np.float32).tobytes() for image in test_images[:128]} <= rows
    assert (images.min(), images.max()) == (0, 1)
    extreme = np.abs(latents) == parity.EXTREME_LATENT
    assert extreme.all(axis=1).sum() == 64, "every latent at once"
    assert (extreme.sum(axis=1) == 1).sum() >= 60, "one latent alone"
    assert ((extreme.sum(axis=1) > 1) & ~extreme.all(axis=1)).sum() >= 60, "some of them"


class Cancelling(nn.Module):
    """The decoder, behind a sum whose large terms cancel but for what float32 drops of them."""

    def __init__(self, decoder: nn.Module, size: float) -> None:
        super().__init__()
        self.decoder, self.size = decoder, size

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.decoder(latent)
        return image + self.size - self.size


def test_where_float32_decides_nothing_the_refusal_says_so(
    model: Checkpoint, decoder: bytes, few_latents: NDArray[np.float32]
) -> None:
    with pytest.raises(ExportError, match=r"Nothing was published\. PyTorch's own float32 .* lower learning rate"):
        parity.measure("decoder.onnx", decoder, Cancelling(model.vae.decoder, 1e4), few_latents)
    with pytest.raises(ExportError, match=r"Nothing was published$"):
        parity.measure("decoder.onnx", decoder, Shifted(model.vae.decoder, 3e-5), few_latents)
