"""A system of the ladder: the one decoder, and the source that its codes come from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vaeserve_training import models, objectives
from vaeserve_training.config import Section, TrainConfig
from vaeserve_training.convolutions import FastConvolutions
from vaeserve_training.data import ImageData
from vaeserve_training.ladder.codes import Code, CodeName, EncoderCode, NoisyEncoderCode, Source, make_source
from vaeserve_training.models import Decoder, Vae
from vaeserve_training.objectives import Observation, Posterior, observe
from vaeserve_training.randomness import Stream, image_noise, seed_of

_BATCH = 500  # images decoded or encoded at once


class Spec(Section):
    """All that a trained system is a function of, besides the images themselves: the key of the cache."""

    codes: CodeName
    """Where the decoder's input comes from."""
    config: TrainConfig
    """Sizes, loss, optimiser and seed; `data.limit_train` is the number of training images."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the weights are kept beside the final ones; 0: before the first."""
    worst_mse: float | None = None
    """Stop as soon as no training image's mean squared error is above this; unset: train to the end."""

    @property
    def images(self) -> int:
        """Number of training images."""
        if self.config.data.limit_train is None:
            raise ValueError("a system of the ladder says how many training images it takes: set data.limit_train")
        return self.config.data.limit_train


class System(nn.Module):
    """A decoder, the source of its codes and, for a Gaussian likelihood, the logarithm of sigma."""

    def __init__(self, spec: Spec, source: Source, decoder: Decoder, log_sigma: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.source = source
        self.decoder = decoder
        self.log_sigma: Tensor | None
        if log_sigma is None or isinstance(log_sigma, nn.Parameter):
            self.log_sigma = log_sigma
        else:
            self.register_buffer("log_sigma", log_sigma)

    def code(self, image: Tensor, row: Tensor, noise: Tensor) -> Code:
        """Return the codes of encoder input (N, C, H, W), the images numbered `row`; see codes.py."""
        code: Code = self.source(image, row, noise)
        return code

    @property
    def latent_size(self) -> int:
        """Numbers in a code."""
        return self.spec.config.model.latent_size

    @property
    def vae(self) -> Vae:
        """The same networks as a `Vae`, for what takes one: the bound of evaluate.py, say."""
        if not isinstance(self.source, NoisyEncoderCode):
            raise TypeError(f"a system with codes from {self.spec.codes!r} has no posterior, so it is no VAE")
        return Vae(self.source.encoder, self.decoder, self.log_sigma)

    def observe(self, pixels: Tensor, seed: int = 0) -> Observation:
        """Return uint8 images as the encoder is fed and judged by, with the noise that evaluate.py draws."""
        uniform = image_noise(seed, Stream.OBSERVATION, 0, len(pixels), tuple(pixels.shape[1:]))
        return observe(pixels, uniform, self.spec.config.objective.likelihood)

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the codes (N, D) of uint8 images; without `noise` (N, D), a VAE's are its posterior's means.

        Where codes do not come from an encoder, the images are the first N training images, in their order.
        """
        image = self.observe(pixels).encoder_input
        rows = torch.arange(len(pixels))
        if noise is None:
            noise = torch.zeros(len(pixels), self.latent_size)
        batches = zip(*(torch.split(part, _BATCH) for part in (image, rows, noise)), strict=True)
        with FastConvolutions():
            return torch.cat([self.code(*batch).latent for batch in batches])

    @torch.no_grad()
    def posteriors(self, pixels: Tensor) -> Posterior:
        """Return the Gaussians (N, D) that codes of uint8 images are drawn from; an autoencoder's have no width."""
        if not isinstance(self.source, EncoderCode | NoisyEncoderCode):
            raise TypeError(f"a system with codes from {self.spec.codes!r} has no encoder")
        images = torch.split(self.observe(pixels).encoder_input, _BATCH)
        with FastConvolutions():
            parts = [self.source.encoder(batch) for batch in images]
        mean, log_variance = (torch.cat(column) for column in zip(*parts, strict=True))
        exact = isinstance(self.source, EncoderCode)
        return Posterior(mean, log_variance.fill_(models.LOG_VARIANCE_RANGE[0]) if exact else log_variance)

    @torch.no_grad()
    def logits(self, latent: Tensor) -> Tensor:
        """Return the images of codes (N, D) before the sigmoid, (N, C, H, W)."""
        with FastConvolutions():
            return torch.cat([self.decoder.logits(batch) for batch in torch.split(latent, _BATCH)])

    def decode(self, latent: Tensor) -> Tensor:
        """Return the images (N, C, H, W) in 0..1 of codes (N, D)."""
        return self.logits(latent).sigmoid()

    def reconstruct(self, pixels: Tensor) -> Tensor:
        """Return what comes back of uint8 images (N, C, H, W), in 0..1: see `encode`."""
        return self.decode(self.encode(pixels))


def build(spec: Spec, data: ImageData) -> System:
    """Return the untrained system; equal specs give equal weights.

    A system that is to memorise starts from grey: an output that starts at the mean of a few images knows them already.
    """
    memorises = spec.codes not in ("encoder", "encoder with noise")
    mean = None if memorises else data.train[: spec.images].mean(axis=0) / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(spec.config.run.seed, Stream.WEIGHTS))
        vae = models.build(spec.config, mean)
        source = make_source(spec.codes, images=spec.images, size=spec.config.model.latent_size, encoder=vae.encoder)
    return System(spec, source, vae.decoder, vae.log_sigma)


def intensity(pixels: Tensor) -> Tensor:
    """Return uint8 images as float32 in 0..1."""
    return pixels.float() / 255


def image_mse(images: Tensor, pixels: Tensor) -> Tensor:
    """Return each image's mean squared error against uint8 images, both (N, C, H, W): (N,)."""
    return objectives.mean_squared_error(images, intensity(pixels))
