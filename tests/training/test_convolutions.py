from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linear_gaussian import normal
from runs import tiny_config, tiny_data
from vaeserve_training import convolutions, evaluate, trainer
from vaeserve_training.convolutions import FastConvolutions, double, halve
from vaeserve_training.fit import fit
from vaeserve_training.models import build
from vaeserve_training.objectives import Observation, losses

# (images, height, width) of the small image, its channels, and those of the large one.
SHAPES = pytest.mark.parametrize("size, channels, filled", [((1, 1, 1), 1, 1), ((3, 7, 4), 5, 1), ((2, 2, 9), 4, 3)])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@SHAPES
@LAYOUTS
def test_doubling_is_the_transposed_convolution(
    size: tuple[int, int, int], channels: int, filled: int, layout: torch.memory_format
) -> None:
    images, height, width = size
    image = normal(images, channels, height, width).contiguous(memory_format=layout).requires_grad_()
    weight = normal(channels, filled, 4, 4, seed=1).requires_grad_()
    _assert_same(double(image, weight), F.conv_transpose2d(image, weight, stride=2, padding=1), image, weight)


@SHAPES
@LAYOUTS
def test_halving_is_the_convolution(
    size: tuple[int, int, int], channels: int, filled: int, layout: torch.memory_format
) -> None:
    images, height, width = size
    image = normal(images, filled, 2 * height, 2 * width).contiguous(memory_format=layout).requires_grad_()
    weight = normal(channels, filled, 4, 4, seed=1).requires_grad_()
    bias = normal(channels, seed=2).requires_grad_()
    _assert_same(halve(image, weight, bias), F.conv2d(image, weight, bias, stride=2, padding=1), image, weight, bias)


def _assert_same(found: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Assert that two results are the same, and their gradients by each input."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    by = normal(*expected.shape, seed=3)
    for one, other in zip(
        torch.autograd.grad(found, inputs, by), torch.autograd.grad(expected, inputs, by), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("blocks", [0, 1])
def test_figures_are_those_of_pytorchs_own_convolutions(
    monkeypatch: pytest.MonkeyPatch, channels: int, blocks: int
) -> None:
    shape = (channels, 8, 8)
    model = {"channels": (6, 5), "blocks": blocks, "hidden": (8,), "latent_size": 2}
    vae, images = build(tiny_config(data={"image_shape": shape}, model=model)), tiny_data(shape).train
    found = evaluate.iw_nll(vae, images, "bernoulli", k=70), evaluate.bound(vae, images, "bernoulli")
    monkeypatch.setattr(evaluate, "FastConvolutions", nullcontext)
    expected = evaluate.iw_nll(vae, images, "bernoulli", k=70), evaluate.bound(vae, images, "bernoulli")
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    torch.testing.assert_close(found[1].distortion, expected[1].distortion, rtol=2e-6, atol=0)
    torch.testing.assert_close(found[1].rate, expected[1].rate, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, layer",
    [
        ("double", nn.ConvTranspose2d(3, 1, kernel_size=4, stride=2, padding=1, bias=False)),
        ("halve", nn.Conv2d(3, 1, kernel_size=4, stride=2, padding=1)),
    ],
)
def test_a_layer_takes_the_faster_way_inside_the_context_only(
    monkeypatch: pytest.MonkeyPatch, name: str, layer: nn.Module
) -> None:
    monkeypatch.setattr(convolutions, name, lambda *_: torch.zeros(0))
    image = torch.ones(2, 3, 4, 4)
    with FastConvolutions():
        assert layer(image).shape == (0,)
    assert layer(image).shape == ((2, 1, 8, 8) if name == "double" else (2, 1, 2, 2))


@pytest.mark.parametrize("filled, geometry, bias", [(1, (4, 2, 1), True), (1, (3, 1, 1), False), (7, (4, 2, 1), True)])
@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.Conv2d])
def test_any_other_layer_answers_as_ever(
    kind: type[nn.Module], filled: int, geometry: tuple[int, int, int], bias: bool
) -> None:
    layer = kind(5, filled, *geometry, bias=bias)  # kernel, stride, padding
    image = torch.rand(2, 5, 6, 6)
    expected = layer(image)
    with FastConvolutions():
        torch.testing.assert_close(layer(image), expected)


def test_a_training_step_has_the_gradients_of_pytorchs_own_convolutions() -> None:
    vae = build(tiny_config(data={"image_shape": (1, 8, 8)}, model={"channels": (6, 5), "blocks": 1})).double()
    target = (normal(7, 1, 8, 8) > 0).double()
    gradients = []
    for context in (FastConvolutions(), nullcontext()):
        with context:
            bounds = losses(vae, Observation(target, target), normal(2, 7, 2), "bernoulli")[0]
        gradients.append(torch.autograd.grad(bounds.sum(), list(vae.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)  # the terms of the loss are float32


def test_training_takes_the_faster_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    class Watched(FastConvolutions):
        def __init__(self) -> None:
            super().__init__()
            asked.append(self)

    monkeypatch.setattr(trainer, "FastConvolutions", Watched)
    fit(tiny_config(optimiser={"epochs": 1}), tmp_path, data=tiny_data())
    assert len(asked) == 7  # steps
