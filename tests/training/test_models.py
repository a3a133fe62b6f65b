from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vaeserve_training.config import PRESETS, ConfigError, ModelConfig, TrainConfig, preset
from vaeserve_training.models import LOG_VARIANCE_RANGE, Decoder, Encoder, build


def with_shape(shape: tuple[int, int, int], **model: object) -> TrainConfig:
    return TrainConfig().with_changes(data={"image_shape": shape}, model=model)


CONFIGS = {
    **{name: preset(name) for name in PRESETS},
    "one pixel": with_shape((1, 1, 1), channels=(), hidden=(), latent_size=1),
    "wide": with_shape((2, 4, 12), latent_size=3),
    "deep": with_shape((4, 32, 16), channels=(4, 8, 8, 8), hidden=(16, 12), latent_size=130),
    "rgb 64": preset("rgb").with_changes(data={"image_shape": (3, 64, 64)}, model={"channels": (8, 8, 8)}),
    "two tanh layers": with_shape((1, 28, 28), channels=(), hidden=(200, 200), activation="tanh", latent_size=50),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_encoder_and_decoder_fit_any_shape_and_latent_size(config: TrainConfig) -> None:
    vae = build(config)
    images = torch.rand(3, *config.data.image_shape)
    mean, log_variance = vae.encoder(images)
    assert mean.shape == log_variance.shape == (3, config.model.latent_size)
    decoded = vae.decoder(mean)
    assert decoded.shape == images.shape
    assert ((decoded >= 0) & (decoded <= 1)).all()
    torch.testing.assert_close(decoded, vae.decoder.logits(mean).sigmoid())


def test_encoder_and_decoder_share_no_weight() -> None:
    vae = build(preset("mnist"))
    encoder = {id(parameter) for parameter in vae.encoder.parameters()}
    decoder = {id(parameter) for parameter in vae.decoder.parameters()}
    assert not encoder & decoder
    assert encoder | decoder == {id(parameter) for parameter in vae.parameters()}


def test_a_shape_that_cannot_be_halved_is_refused_by_the_modules_too() -> None:
    for module in (Encoder, Decoder):
        with pytest.raises(ConfigError, match="multiples of 4"):
            module(ModelConfig(), (1, 28, 30))


def test_log_variance_is_clamped_on_extreme_inputs() -> None:
    vae = build(preset("mnist-mlp"))
    for sign in (1, -1):
        with torch.no_grad():
            vae.encoder.head.bias.fill_(sign * 1e6)
        _, log_variance = vae.encoder(torch.rand(2, 1, 28, 28))
        assert (log_variance == LOG_VARIANCE_RANGE[sign > 0]).all()


def silence(decoder: Decoder) -> None:
    """Zero the last layer, so that only the output bias is left."""
    with torch.no_grad():
        decoder.body[-1 if isinstance(decoder.body[-1], torch.nn.ConvTranspose2d) else -2].weight.zero_()


@pytest.mark.parametrize("name", ["mnist", "mnist-mlp"])
def test_a_grey_decoder_starts_at_each_pixels_clipped_mean(name: str) -> None:
    pixel_mean = np.linspace(0, 1, 28 * 28).reshape(1, 28, 28)
    vae = build(preset(name), pixel_mean)
    silence(vae.decoder)
    image = vae.decoder(torch.randn(1, vae.latent_size))[0].detach().numpy()
    np.testing.assert_allclose(image, pixel_mean.clip(1e-3, 1 - 1e-3), atol=1e-6)


def test_a_colour_decoder_starts_at_each_channels_mean() -> None:
    pixel_mean = np.random.default_rng(0).random((3, 32, 32)) * np.array([0.2, 0.5, 1.0])[:, None, None]
    vae = build(preset("rgb"), pixel_mean)
    silence(vae.decoder)
    image = vae.decoder(torch.randn(1, vae.latent_size))[0].detach().numpy()
    expected = np.broadcast_to(pixel_mean.mean(axis=(1, 2), keepdims=True), image.shape)
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_a_mean_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(28, 28\).*\(1, 28, 28\)"):
        build(preset("mnist"), np.zeros((28, 28)))


def test_only_a_gaussian_model_has_a_sigma_and_only_a_learned_one_is_a_parameter() -> None:
    assert build(preset("mnist")).sigma is None
    learned = build(preset("rgb"))
    optimal = build(preset("rgb").with_changes(objective={"sigma": "optimal"}))
    assert learned.sigma == optimal.sigma == pytest.approx(math.exp(learned.state_dict()["log_sigma"]))
    assert "log_sigma" in dict(learned.named_parameters())
    assert "log_sigma" not in dict(optimal.named_parameters())
    assert "log_sigma" in optimal.state_dict()
