"""The encoder q(z|x) and the decoder p(x|z) as two separate modules, because they are exported and served separately.

One family covers every size: `channels` strided convolutions (none makes a perceptron), each with `blocks` gated
residual blocks behind it, then `hidden` dense layers, and the mirror image of all that. The decoder knows nothing of
where its latent comes from.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaeserve_training.config import ModelConfig, TrainConfig, check_image_shape

LOG_VARIANCE_RANGE = (-14.0, 6.0)  # before exp: stddev from 9e-4 to 20, so no input overflows
# A decoder in float32 is only as exact as its largest intermediate value: at latents of 1000, PyTorch is 2e-4 away from
# its own float64 result, and at 1e38 it gives NaN. N(0, 1) leaves this range once in 10^22 draws.
LATENT_RANGE = (-10.0, 10.0)
PIXEL_MEAN_RANGE = (1e-3, 1 - 1e-3)
INITIAL_SIGMA = 0.3  # about the standard deviation of natural pixels on the 0..1 scale

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class GatedBlock(nn.Module):
    """x + a * sigmoid(b), where a and b are two 3x3 convolutions deep: (N, C, H, W) -> (N, C, H, W).

    The gated residual block of PixelCNN++ (Salimans et al. 2017) without its skip connections and dropout.
    """

    def __init__(self, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            activation(),
            nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the image with the block's gated change added."""
        change, gate = self.body(image).chunk(2, dim=1)
        changed: Tensor = image + change * torch.sigmoid(gate)
        return changed


class Encoder(nn.Module):
    """Image (N, C, H, W) in 0..1 -> mean and log-variance of the diagonal Gaussian q(z|x), (N, D) each."""

    def __init__(self, config: ModelConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        check_image_shape(image_shape, config.channels)
        self.latent_size = config.latent_size
        activation = _ACTIVATIONS[config.activation]
        layers: list[nn.Module] = []
        for before, after in pairwise((image_shape[0], *config.channels)):
            layers += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), activation()]
            layers += [GatedBlock(after, activation) for _ in range(config.blocks)]
        layers.append(nn.Flatten())
        widths = (math.prod(_deepest_shape(config, image_shape)), *config.hidden)
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 2 * config.latent_size)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, log_variance); the latter clamped to LOG_VARIANCE_RANGE."""
        mean, log_variance = self.head(self.body(image)).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


class Decoder(nn.Module):
    """Latent (N, D) -> mean of p(x|z), (N, C, H, W) in 0..1."""

    def __init__(
        self, config: ModelConfig, image_shape: tuple[int, int, int], pixel_mean: NDArray[np.floating] | None = None
    ) -> None:
        """Make a decoder whose output starts at `pixel_mean`, float (C, H, W) in 0..1; None starts at 0.5."""
        super().__init__()
        check_image_shape(image_shape, config.channels)
        deepest = _deepest_shape(config, image_shape)
        widths = (config.latent_size, *reversed(config.hidden), math.prod(deepest))
        dense = [nn.Linear(before, after) for before, after in pairwise(widths)]
        deconvolutions = [
            nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1)
            for before, after in pairwise((*reversed(config.channels), image_shape[0]))
        ]
        (deconvolutions or dense)[-1].register_parameter("bias", None)  # `output_bias` is in its place
        activation = _ACTIVATIONS[config.activation]
        layers: list[nn.Module] = []
        for layer in (*dense, nn.Unflatten(1, deepest), *deconvolutions):
            if layers and not isinstance(layer, nn.Unflatten):
                layers.append(activation())
            if isinstance(layer, nn.ConvTranspose2d):
                layers += [GatedBlock(layer.in_channels, activation) for _ in range(config.blocks)]
            layers.append(layer)
        self.body = nn.Sequential(*layers)
        self.output_bias = nn.Parameter(_initial_bias(image_shape, pixel_mean))

    def logits(self, latent: Tensor) -> Tensor:
        """Return the image before its sigmoid, (N, C, H, W). Latents are clamped to LATENT_RANGE."""
        body: Tensor = self.body(latent.clamp(*LATENT_RANGE))
        return body + self.output_bias

    def forward(self, latent: Tensor) -> Tensor:
        """Return the image in 0..1, (N, C, H, W)."""
        return torch.sigmoid(self.logits(latent))


class Vae(nn.Module):
    """An encoder, a decoder and, for a Gaussian likelihood, the logarithm of its standard deviation."""

    def __init__(self, encoder: Encoder, decoder: Decoder, log_sigma: Tensor | None = None) -> None:
        """Join the parts. `log_sigma` is a scalar: an nn.Parameter is learned, a tensor is state, None is absent."""
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.log_sigma: Tensor | None
        if log_sigma is None or isinstance(log_sigma, nn.Parameter):
            self.log_sigma = log_sigma
        else:
            self.register_buffer("log_sigma", log_sigma)

    @property
    def latent_size(self) -> int:
        """Number of latents D."""
        return self.encoder.latent_size

    @property
    def sigma(self) -> float | None:
        """Standard deviation of a Gaussian pixel on the 0..1 scale; None for other likelihoods."""
        return None if self.log_sigma is None else float(self.log_sigma.detach().exp())


def build(config: TrainConfig, pixel_mean: NDArray[np.floating] | None = None) -> Vae:
    """Return a VAE with weights drawn from PyTorch's global generator.

    `pixel_mean`, float (C, H, W) in 0..1, is the training images' mean, where the decoder's output starts. It may be
    None when weights are loaded afterwards.
    """
    log_sigma: Tensor | None = None
    if config.objective.likelihood == "gaussian":
        log_sigma = torch.tensor(math.log(INITIAL_SIGMA))
        if config.objective.sigma == "learned":
            log_sigma = nn.Parameter(log_sigma)
    shape = config.data.image_shape
    vae = Vae(Encoder(config.model, shape), Decoder(config.model, shape, pixel_mean), log_sigma)
    if config.model.initialisation == "glorot":
        vae.apply(_initialise_glorot)
    return vae


@torch.no_grad()
def _initialise_glorot(module: nn.Module) -> None:
    """Draw a layer's weights from the uniform distribution of Glorot and Bengio 2010, equation 16; its bias is 0."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _deepest_shape(config: ModelConfig, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the shape (C, H, W) after the last convolution."""
    factor = 2 ** len(config.channels)
    return (image_shape[0], *config.channels)[-1], image_shape[1] // factor, image_shape[2] // factor


def _initial_bias(image_shape: tuple[int, int, int], pixel_mean: NDArray[np.floating] | None) -> Tensor:
    """Return the logit of the clipped mean: per pixel (1, H, W) for grey images, per channel (C, 1, 1) for colour."""
    mean = np.full(image_shape, 0.5) if pixel_mean is None else np.asarray(pixel_mean, dtype=np.float64)
    if mean.shape != image_shape:
        raise ValueError(f"pixel_mean has shape {mean.shape}; the images have shape {image_shape}")
    if image_shape[0] > 1:
        mean = mean.mean(axis=(1, 2), keepdims=True)
    mean = mean.clip(*PIXEL_MEAN_RANGE)
    return torch.from_numpy(np.log(mean / (1 - mean)).astype(np.float32))
