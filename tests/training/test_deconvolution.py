from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linear_gaussian import normal
from runs import tiny_config, tiny_data
from vaeserve_training import deconvolution, evaluate
from vaeserve_training.deconvolution import FastDeconvolutions, double
from vaeserve_training.models import build


@pytest.mark.parametrize("images, channels, filled, height, width", [(1, 1, 1, 1, 1), (3, 5, 1, 7, 4), (2, 4, 3, 2, 9)])
def test_doubling_is_the_transposed_convolution(
    images: int, channels: int, filled: int, height: int, width: int
) -> None:
    image = normal(images, channels, height, width)
    weight = normal(channels, filled, 4, 4, seed=1)
    expected = F.conv_transpose2d(image, weight, stride=2, padding=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = double(image.contiguous(memory_format=layout), weight)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("blocks", [0, 1])
def test_figures_are_those_of_pytorchs_own_convolutions(
    monkeypatch: pytest.MonkeyPatch, channels: int, blocks: int
) -> None:
    shape = (channels, 8, 8)
    model = {"channels": (6, 5), "blocks": blocks, "hidden": (8,), "latent_size": 2}
    vae, images = build(tiny_config(data={"image_shape": shape}, model=model)), tiny_data(shape).train
    found = evaluate.iw_nll(vae, images, "bernoulli", k=70), evaluate.bound(vae, images, "bernoulli")
    monkeypatch.setattr(evaluate, "FastDeconvolutions", nullcontext)
    expected = evaluate.iw_nll(vae, images, "bernoulli", k=70), evaluate.bound(vae, images, "bernoulli")
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    torch.testing.assert_close(found[1].distortion, expected[1].distortion, rtol=2e-6, atol=0)
    torch.testing.assert_close(found[1].rate, expected[1].rate, rtol=0, atol=0)


def test_a_layer_takes_the_faster_way_inside_the_context_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.ConvTranspose2d(3, 1, kernel_size=4, stride=2, padding=1, bias=False)
    monkeypatch.setattr(deconvolution, "double", lambda image, weight: torch.zeros(0))
    image = torch.ones(2, 3, 4, 4)
    with FastDeconvolutions():
        assert layer(image).shape == (0,)
    assert layer(image).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "filled, kernel, stride, padding, bias", [(1, 4, 2, 1, True), (1, 3, 1, 1, False), (7, 4, 2, 1, True)]
)
def test_any_other_layer_answers_as_ever(filled: int, kernel: int, stride: int, padding: int, bias: bool) -> None:
    layer = nn.ConvTranspose2d(5, filled, kernel, stride, padding, bias=bias)
    image = torch.rand(2, 5, 6, 6)
    expected = layer(image)
    with FastDeconvolutions():
        torch.testing.assert_close(layer(image), expected)
