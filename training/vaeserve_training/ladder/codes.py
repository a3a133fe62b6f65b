"""Where a decoder's input comes from: the six sources that the ladder climbs through.

All steps train the same `Decoder` with the same loop, so this file is the whole difference between memorising one image
and a variational autoencoder. Every source answers the same call:

    source(image, row, noise) -> Code

`image` is a batch of encoder input (N, C, H, W), `row` the images' numbers in the training set (N,), `noise` a draw
from N(0, I) (N, D). A source takes what it needs: the first never looks at anything, the last is the only one that
looks at the noise, and only the last two can code an image that they were not trained on.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaeserve_training.models import Encoder
from vaeserve_training.objectives import kl_divergence, reparameterize

CodeName = Literal["constant", "one-hot", "fixed vectors", "learned vectors", "encoder", "encoder with noise"]


class Code(NamedTuple):
    """What a decoder is given, (N, D), and the rate it is charged for, (N,) in nats: 0 but for the last source."""

    latent: Tensor
    rate: Tensor


class ConstantCode(nn.Module):
    """Ones, whatever the image: all that a decoder can do is memorise one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor, row: Tensor, noise: Tensor) -> Code:
        """Return ones (N, D)."""
        return _free(torch.ones(len(row), self.size, device=row.device))


class OneHotCode(nn.Module):
    """A one in the image's own place: the number of an image, with no notion of which images are alike."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor, row: Tensor, noise: Tensor) -> Code:
        """Return one-hot rows (N, D)."""
        return _free(F.one_hot(row, self.size).float())


class FixedVectors(nn.Module):
    """Real numbers drawn once from N(0, I): short, but as arbitrary as a number on a list."""

    def __init__(self, images: int, size: int) -> None:
        super().__init__()
        self.vectors: Tensor
        self.register_buffer("vectors", torch.randn(images, size))

    def forward(self, image: Tensor, row: Tensor, noise: Tensor) -> Code:
        """Return each image's vector (N, D)."""
        return _free(self.vectors[row])


class LearnedVectors(nn.Module):
    """The same, but the vectors are trained with the decoder, so that alike images may move together."""

    def __init__(self, images: int, size: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(images, size))

    def forward(self, image: Tensor, row: Tensor, noise: Tensor) -> Code:
        """Return each image's vector (N, D)."""
        return _free(self.vectors[row])


class EncoderCode(nn.Module):
    """What an encoder makes of the image: the standard autoencoder. Unseen images get a code, too."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor, row: Tensor, noise: Tensor) -> Code:
        """Return the encoder's mean (N, D); its log-variance stays unused."""
        mean, _ = self.encoder(image)
        return _free(mean)


class NoisyEncoderCode(nn.Module):
    """A draw from the Gaussian that an encoder gives, and its distance from N(0, I): the variational autoencoder."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor, row: Tensor, noise: Tensor) -> Code:
        """Return mean + stddev * noise (N, D) and KL(q(z|x) || N(0, I))."""
        mean, log_variance = self.encoder(image)
        return Code(reparameterize(mean, log_variance, noise), kl_divergence(mean, log_variance).sum(1))


Source = ConstantCode | OneHotCode | FixedVectors | LearnedVectors | EncoderCode | NoisyEncoderCode


def make_source(name: CodeName, *, images: int, size: int, encoder: Encoder) -> Source:
    """Return the source of that name for codes of `size` numbers; only the last two use the encoder."""
    match name:
        case "constant":
            return ConstantCode(size)
        case "one-hot":
            return OneHotCode(size)
        case "fixed vectors":
            return FixedVectors(images, size)
        case "learned vectors":
            return LearnedVectors(images, size)
        case "encoder":
            return EncoderCode(encoder)
        case "encoder with noise":
            return NoisyEncoderCode(encoder)


def _free(latent: Tensor) -> Code:
    return Code(latent, torch.zeros(len(latent), device=latent.device))
