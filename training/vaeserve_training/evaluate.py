"""Held-out figures of a model, each with its protocol in words: figures of different protocols do not compare.

All noise is a function of (seed, image), so a figure does not depend on the batch size, and grey and binarised encoder
input are judged by the same binarised targets and the same posterior noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaeserve.v1 import vae_pb2
from vaeserve_training import objectives
from vaeserve_training.compute import as_tensor
from vaeserve_training.config import LikelihoodName
from vaeserve_training.convolutions import FastConvolutions
from vaeserve_training.data import ImageData
from vaeserve_training.models import Vae
from vaeserve_training.objectives import Observation, Posterior, Prior
from vaeserve_training.randomness import BLOCK_IMAGES, Stream, generator, image_noise
from vaeserve_training.report import EvaluationError, Report

ACTIVE_VARIANCE = 0.01  # Burda, Grosse and Salakhutdinov 2016, section 5.2
DEFAULT_BATCH_SIZE = 500
_BLOCK_SAMPLES = 64  # importance samples whose noise is drawn at once

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Bound:
    """The bound's terms for each image, float64 (M,), and its posterior, float64 (M, D), on the CPU."""

    distortion: Tensor
    rate: Tensor
    posterior: Posterior

    @property
    def neg_elbo(self) -> float:
        """Mean of distortion + rate: nats, or the plain loss for mse."""
        return float((self.distortion + self.rate).mean())

    @property
    def active_units(self) -> int:
        """Latents whose posterior mean varies over the images by more than ACTIVE_VARIANCE."""
        return int((self.posterior.mean.var(dim=0, correction=0) > ACTIVE_VARIANCE).sum())


def evaluate(
    vae: Vae,
    data: ImageData,
    likelihood: LikelihoodName,
    *,
    seed: int = 0,
    iw_samples: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    images: int | None = None,
    prior: Prior | None = None,
    advance: Advance | None = None,
) -> Report:
    """Evaluate a model on `data.test`, or the first `images` of them, on the device it is on.

    `iw_samples` is k of the importance-weighted NLL, 0 leaves it out; `batch_size` bounds the images in memory; a
    `prior` adds the figures under it to those under N(0, I). `advance` is told the number of images (k = 0) or
    importance samples finished, `work` of them in all. Raises EvaluationError if there are no test images or a figure
    is not finite.
    """
    if not len(data.test):
        raise EvaluationError(f"data set {data.name} has no test images; raise data.test_fraction")
    pixels = data.test[:images]

    def judged(prior: Prior | None) -> tuple[Bound, vae_pb2.Evaluation]:
        told = None if iw_samples else advance
        terms = bound(vae, pixels, likelihood, seed=seed, prior=prior, batch_size=batch_size, advance=told)
        entry = _evaluation(terms, data, likelihood, seed, grey_input=likelihood != "bernoulli")
        if prior is not None:
            entry.ClearField("rate_nats")  # it is the rate against N(0, I)
            entry.protocol += "; prior: the fitted one"
        if iw_samples:
            nll = iw_nll(
                vae, pixels, likelihood, seed=seed, k=iw_samples, prior=prior, batch_size=batch_size, advance=advance
            )
            entry.iw_nll_nats = float(nll.mean())
            entry.iw_samples = iw_samples
            entry.protocol += f"; importance-weighted NLL with k = {iw_samples}"
        return terms, entry

    first, entry = judged(None)
    evaluations = [entry]
    if likelihood == "bernoulli" and not data.binarised:
        grey = bound(vae, pixels, likelihood, seed=seed, grey_input=True, batch_size=batch_size)
        evaluations.append(_evaluation(grey, data, likelihood, seed, grey_input=True))
    if prior is not None and likelihood != "mse":
        evaluations.append(judged(prior)[1])
    return Report(evaluations, latent_statistics(first))


def work(data: ImageData, *, iw_samples: int, images: int | None = None, prior: Prior | None = None) -> int:
    """Return how much `evaluate` tells `advance` in all."""
    return len(data.test[:images]) * max(1, iw_samples) * (1 if prior is None else 2)


def bound(
    vae: Vae,
    pixels: NDArray[np.uint8],
    likelihood: LikelihoodName,
    *,
    seed: int = 0,
    grey_input: bool = False,
    prior: Prior | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    advance: Advance | None = None,
) -> Bound:
    """Return the terms with one posterior sample for each of the uint8 images (M, C, H, W).

    `grey_input` feeds the encoder intensities in 0..1 instead of the Bernoulli sample that is the target. The prior is
    N(0, I) if not given; under another one the rate is a sample.
    """
    parts = []
    with evaluating(vae) as device:
        for start in range(0, len(pixels), batch_size):
            batch = as_tensor(pixels[start : start + batch_size])
            observation = observe(batch, likelihood, seed, start, device, grey_input=grey_input)
            noise = image_noise(seed, Stream.POSTERIOR, start, start + len(batch), (vae.latent_size,))
            terms = objectives.terms(vae, observation, noise.to(device), likelihood, prior)
            parts.append([tensor.cpu().double() for tensor in (terms.distortion, terms.rate, *terms.posterior)])
            if advance:
                advance(len(batch))
    distortion, rate, mean, log_variance = (torch.cat(column) for column in zip(*parts, strict=True))
    return Bound(distortion, rate, Posterior(mean, log_variance))


def iw_nll(
    vae: Vae,
    pixels: NDArray[np.uint8],
    likelihood: LikelihoodName,
    *,
    k: int,
    seed: int = 0,
    prior: Prior | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    advance: Advance | None = None,
) -> NDArray[np.float64]:
    """Return the importance-weighted NLL of each image, float64 (M,), in nats.

    Burda, Grosse and Salakhutdinov 2016, equation 8, with k samples. At most `batch_size` images are decoded at once;
    `advance` is told the importance samples finished, M * k in all.
    """
    if likelihood == "mse":
        raise EvaluationError("mse is no normalised likelihood, so there is no NLL; train with bernoulli or gaussian")
    results = []
    with evaluating(vae) as device:
        for start in range(0, len(pixels), BLOCK_IMAGES):
            batch = as_tensor(pixels[start : start + BLOCK_IMAGES])
            observation = observe(batch, likelihood, seed, start, device)
            posterior = objectives.encode(vae, observation.encoder_input)
            log_sum = torch.full((len(batch),), -math.inf, device=device, dtype=torch.float64)
            block = (seed, Stream.IMPORTANCE, start // BLOCK_IMAGES)
            for drawn in _importance_noise(block, k, vae.latent_size, batch_size, device):
                for first in range(0, len(batch), batch_size):
                    part = slice(first, min(first + batch_size, len(batch)))
                    own = Posterior(posterior.mean[part], posterior.log_variance[part])
                    noise = drawn[:, part]
                    weights = objectives.log_importance_weights(
                        vae, own, observation.target[part], noise, likelihood, prior=prior
                    )
                    log_sum[part] = torch.logaddexp(log_sum[part], weights.double().logsumexp(0))
                    if advance:
                        advance(noise.shape[0] * noise.shape[1])
            results.append((math.log(k) - log_sum).cpu().numpy())
    return np.concatenate(results)


def optimal_sigma(vae: Vae, pixels: NDArray[np.uint8], *, seed: int = 0, batch_size: int = DEFAULT_BATCH_SIZE) -> float:
    """Return the sigma of a Gaussian likelihood under which these images are likeliest, z drawn from q(z|x)."""
    squares = 0.0
    with evaluating(vae) as device:
        for start in range(0, len(pixels), batch_size):
            batch = as_tensor(pixels[start : start + batch_size])
            observation = observe(batch, "gaussian", seed, start, device)
            noise = image_noise(seed, Stream.POSTERIOR, start, start + len(batch), (vae.latent_size,)).to(device)
            latent = objectives.reparameterize(*objectives.encode(vae, observation.encoder_input), noise)
            errors = objectives.mean_squared_error(vae.decoder(latent).float(), observation.target)
            squares += float(errors.double().sum())
    return max(math.sqrt(squares / len(pixels)), objectives.MIN_SIGMA)


def reconstruct(
    vae: Vae, pixels: NDArray[np.uint8], likelihood: LikelihoodName, *, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what the encoder is fed of a few uint8 images (N, C, H, W), and what is decoded of its mean, both 0..1."""
    with evaluating(vae) as device:
        seen = observe(as_tensor(pixels), likelihood, seed, 0, device).encoder_input
        decoded = vae.decoder(objectives.encode(vae, seen).mean).float()
    return seen.cpu().numpy(), decoded.cpu().numpy()


def latent_statistics(terms: Bound) -> vae_pb2.LatentStatistics:
    """Return the aggregate posterior's statistics for each latent."""
    mean, log_variance = terms.posterior
    variance = log_variance.exp()
    return vae_pb2.LatentStatistics(
        mean=mean.mean(0).tolist(),
        stddev=(mean.var(dim=0, correction=0) + variance.mean(0)).sqrt().tolist(),
        mean_posterior_stddev=variance.sqrt().mean(0).tolist(),
        kl_nats=objectives.kl_divergence(mean, log_variance).mean(0).tolist(),
    )


def _evaluation(
    terms: Bound, data: ImageData, likelihood: LikelihoodName, seed: int, *, grey_input: bool
) -> vae_pb2.Evaluation:
    if not math.isfinite(terms.neg_elbo):
        raise EvaluationError(f"the loss on {data.name} is {terms.neg_elbo}; the model has diverged, train it again")
    evaluation = vae_pb2.Evaluation(
        protocol=_protocol(data, len(terms.rate), likelihood, seed, grey_input=grey_input),
        images=len(terms.rate),
        encoder_input=vae_pb2.ENCODER_INPUT_GREY if grey_input else vae_pb2.ENCODER_INPUT_BINARISED,
        rate_nats=float(terms.rate.mean()),
        active_units=terms.active_units,
    )
    if likelihood == "mse":
        evaluation.loss = terms.neg_elbo
        return evaluation
    evaluation.neg_elbo_nats = terms.neg_elbo
    evaluation.distortion_nats = float(terms.distortion.mean())
    if likelihood == "gaussian":
        # On the 0..1 scale a level is 1/256 wide: log2(256) = 8 bits turn density into probability.
        evaluation.bits_per_dim = terms.neg_elbo / (math.prod(data.test.shape[1:]) * math.log(2)) + 8
    return evaluation


def _protocol(data: ImageData, judged: int, likelihood: LikelihoodName, seed: int, *, grey_input: bool) -> str:
    images = f"{len(data.test)} test images of {data.name}"
    if judged < len(data.test):
        images = f"the first {judged} of {images}"
    sampling = f"1 posterior sample per image, seed {seed}"
    if likelihood == "mse":
        return f"{images}; intensities in 0..1, mean squared error + KL, no likelihood; {sampling}"
    if likelihood == "gaussian":
        return f"{images}; uniform dequantisation, seed {seed}, density on 0..1; encoder input: intensities; {sampling}"
    if data.binarised:
        return f"{images}; static binarisation, the data set's own; encoder input: the binarised image; {sampling}"
    encoder_input = "grey intensities, targets binarised" if grey_input else "the same binarised image"
    return (
        f"{images}; dynamic binarisation, one Bernoulli sample per image, seed {seed}; "
        f"encoder input: {encoder_input}; {sampling}"
    )


def observe(
    pixels: Tensor,
    likelihood: LikelihoodName,
    seed: int,
    start: int,
    device: torch.device,
    *,
    grey_input: bool = False,
) -> Observation:
    """Return the observation of images `start ..`, whose noise does not depend on the batch."""
    uniform = None
    if likelihood != "mse":
        stop = start + len(pixels)
        uniform = image_noise(seed, Stream.OBSERVATION, start, stop, tuple(pixels.shape[1:])).to(device)
    pixels = pixels.to(device)
    observation = objectives.observe(pixels, uniform, likelihood)
    return Observation(pixels.float() / 255, observation.target) if grey_input else observation


def _importance_noise(
    block: tuple[int, ...], k: int, latent_size: int, rows: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield N(0, 1) noise (samples, BLOCK_IMAGES, D), k samples in all, about `rows` latents at a time.

    It is drawn in fixed chunks and then cut, so that it does not depend on `rows`.
    """
    for chunk, drawn in enumerate(range(0, k, _BLOCK_SAMPLES)):
        source = generator(*block, chunk, device=device)
        shape = (min(_BLOCK_SAMPLES, k - drawn), BLOCK_IMAGES, latent_size)
        yield from torch.split(torch.randn(shape, generator=source, device=device), max(1, rows // BLOCK_IMAGES))


@contextmanager
def evaluating(vae: Vae) -> Iterator[torch.device]:
    """Put the model in evaluation mode without gradients; give the device it is on.

    float32 is float32 here: cuDNN's convolutions would otherwise round to TF32.
    """
    was_training = vae.training
    vae.eval()
    try:
        cudnn = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.no_grad(), cudnn, FastConvolutions():
            yield next(vae.parameters()).device
    finally:
        vae.train(was_training)
