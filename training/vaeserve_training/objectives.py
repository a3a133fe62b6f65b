"""The bounds on the likelihood, written once: training, evaluation and every experiment call these functions.

For an image x, a latent z drawn from q(z|x) and the prior p(z) = N(0, I), in nats per image (Kingma and Welling 2014,
equation 3):

    -ELBO = distortion + rate,  distortion = -log p(x|z),  rate = KL(q(z|x) || p(z))

With k latents of each image, drawn independently, the importance-weighted bound is tighter, and for k = 1 it is the
ELBO with the rate sampled rather than in closed form (Burda, Grosse and Salakhutdinov 2016, equation 8):

    -L_k = -log (1/k sum_i w_i),  w_i = p(x|z_i) p(z_i) / q(z_i|x)

What x is depends on the likelihood:

bernoulli   a fresh Bernoulli sample of each image, which is the encoder's input and the target at once. Cross-entropy
            on grey targets is no normalised likelihood, so it is not offered.
gaussian    the image after uniform dequantisation, (pixel + u) / 256 with u in [0, 1); the encoder sees pixel / 255,
            which the server can feed it. The bound stays one, since pixel is a function of x.
mse         `mean(square(generated - real)) + KL`, as explanations write it, on pixel / 255. Up to a constant, dividing
            the sum of squares by the number of pixels P is a Gaussian likelihood of variance P / 2 (392 on 28x28
            images), against pixels in 0..1. So much noise leaves nothing worth encoding: the posterior collapses to
            the prior (rate about 0, no active unit). The cure is a likelihood that is normalised, bernoulli or
            gaussian with its own sigma.

Every term is computed in float32, whatever the networks ran in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaeserve_training.config import BoundName, LikelihoodName
from vaeserve_training.models import Decoder, Vae

LOG_2PI = math.log(2 * math.pi)
# Dequantised pixels fill bins of width 1/256, whose own standard deviation is 1 / (256 sqrt(12)).
MIN_SIGMA = 1 / (256 * math.sqrt(12))


class GenerativeModel(Protocol):
    """What `distortion` needs of a model: p(x|z), wherever the latent comes from."""

    decoder: Decoder
    log_sigma: Tensor | None
    training: bool


class Prior(Protocol):
    """A p(z) other than N(0, I)."""

    def log_density(self, latent: Tensor) -> Tensor:
        """Return log p(z) in nats, (..., D) -> (...)."""


@dataclass(frozen=True)
class Observation:
    """What the encoder is fed and what the decoder is judged by, float32 (N, C, H, W)."""

    encoder_input: Tensor
    target: Tensor


class Posterior(NamedTuple):
    """The diagonal Gaussian q(z|x) of each image, float32 (N, D) each."""

    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True)
class Terms:
    """The terms of the bound for each image, float32 (N,), and the posterior they came from."""

    distortion: Tensor
    rate: Tensor
    posterior: Posterior

    @property
    def neg_elbo(self) -> Tensor:
        """Distortion + rate, (N,): nats for a normalised likelihood, the plain loss for mse."""
        return self.distortion + self.rate


def observe(pixels: Tensor, uniform: Tensor | None, likelihood: LikelihoodName) -> Observation:
    """Turn uint8 images (N, C, H, W) into what the model is trained on.

    `uniform` is noise in [0, 1) of the same shape, for the Bernoulli sample or the dequantisation; mse takes none.
    Images that are 0 or 255 already are their own Bernoulli samples.
    """
    intensity = pixels.float() / 255
    if likelihood == "mse":
        return Observation(intensity, intensity)
    if uniform is None:
        raise ValueError(f"the {likelihood} likelihood needs uniform noise of the images' shape")
    if likelihood == "gaussian":
        return Observation(intensity, (pixels.float() + uniform) / 256)
    binarised = (uniform < intensity).float()
    return Observation(binarised, binarised)


def encode(vae: Vae, encoder_input: Tensor) -> Posterior:
    """Return q(z|x) of each image in float32."""
    mean, log_variance = vae.encoder(encoder_input)
    return Posterior(mean.float(), log_variance.float())


def reparameterize(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """Return z = mean + stddev * noise; `noise` is N(0, 1) of shape (..., N, D)."""
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, stddev^2) || N(0, 1)) of each latent, in nats (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def standard_normal_log_density(latent: Tensor) -> Tensor:
    """Return log N(z; 0, I) in nats, (..., D) -> (...)."""
    return -0.5 * (latent.square() + LOG_2PI).sum(-1)


def bernoulli_nll(logits: Tensor, target: Tensor) -> Tensor:
    """Return -log p(target) of independent Bernoulli pixels, summed over each image: (N, C, H, W) -> (N,)."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).sum(1)


def gaussian_nll(image: Tensor, target: Tensor, log_sigma: Tensor) -> Tensor:
    """Return -log p(target) of independent Gaussian pixels around `image`, one sigma for all: (N, C, H, W) -> (N,).

    Each pixel adds 0.5 log(2 pi sigma^2), so the figure is in nats of a density on the 0..1 scale. Sigma is kept at or
    above MIN_SIGMA.
    """
    log_sigma = log_sigma.clamp(min=math.log(MIN_SIGMA))
    squares = (image - target).square().flatten(1).sum(1)
    return 0.5 * squares * torch.exp(-2 * log_sigma) + target[0].numel() * (log_sigma + 0.5 * LOG_2PI)


def mean_squared_error(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean over each image's pixels of (image - target)^2: (N, C, H, W) -> (N,)."""
    return (image - target).square().flatten(1).mean(1)


def optimal_log_sigma(image: Tensor, target: Tensor) -> Tensor:
    """Return the logarithm of the sigma under which `target` is likeliest: the root mean squared error (a scalar).

    The optimal sigma of Rybkin, Daniilidis and Levine 2021 (sigma-VAE).
    """
    return 0.5 * mean_squared_error(image, target).mean().log()


def distortion(model: GenerativeModel, latent: Tensor, target: Tensor, likelihood: LikelihoodName) -> Tensor:
    """Return what the decoder's image costs against `target`, (N,): nats, or the mean squared error for mse.

    A Gaussian model that is in training mode and whose sigma is no parameter takes the batch's optimal one.
    """
    if likelihood == "bernoulli":
        return bernoulli_nll(model.decoder.logits(latent).float(), target)
    image = model.decoder(latent).float()
    if likelihood == "mse":
        return mean_squared_error(image, target)
    if model.log_sigma is None:
        raise ValueError("a model without sigma has no gaussian likelihood")
    log_sigma = model.log_sigma
    if model.training and not isinstance(log_sigma, nn.Parameter):
        log_sigma = optimal_log_sigma(image, target)
    return gaussian_nll(image, target, log_sigma.float())


def terms(
    vae: Vae, observation: Observation, noise: Tensor, likelihood: LikelihoodName, prior: Prior | None = None
) -> Terms:
    """Return the bound's terms with one posterior sample per image; `noise` is N(0, 1), float32 (N, D).

    Under a `prior` other than N(0, I) the rate is that sample's log q(z|x) - log p(z), not a closed form.
    """
    found = losses(vae, observation, noise.unsqueeze(0), likelihood)[1]
    if prior is None:
        return found
    latent = reparameterize(*found.posterior, noise)
    return replace(found, rate=-_log_prior_ratio(found.posterior, latent, noise, prior))


def losses(
    vae: Vae,
    observation: Observation,
    noise: Tensor,
    likelihood: LikelihoodName,
    *,
    bound: BoundName = "elbo",
    rate_weight: float = 1.0,
) -> tuple[Tensor, Terms]:
    """Return what training minimises for each image, (N,), and the terms; `noise` is N(0, 1), float32 (K, N, D).

    elbo: the mean distortion of K latents + `rate_weight` * rate. iwae: -L_K of the module's docstring; `rate_weight`
    does not enter. The terms are the mean distortion and the rate in closed form under either bound.
    """
    posterior = encode(vae, observation.encoder_input)
    latent = reparameterize(posterior.mean, posterior.log_variance, noise)  # (K, N, D)
    distortions = _distortions(vae, latent, observation.target, likelihood)  # (K, N)
    rate = kl_divergence(posterior.mean, posterior.log_variance).sum(1)
    found = Terms(distortions.mean(0), rate, posterior)
    if bound == "elbo":
        return found.distortion + rate_weight * rate, found
    return iw_nll(_log_prior_ratio(posterior, latent, noise) - distortions), found


def log_importance_weights(
    vae: Vae,
    posterior: Posterior,
    target: Tensor,
    noise: Tensor,
    likelihood: LikelihoodName,
    *,
    prior: Prior | None = None,
) -> Tensor:
    """Return log p(x|z) + log p(z) - log q(z|x) for K latents of each image, (K, N); `noise` is (K, N, D).

    Burda, Grosse and Salakhutdinov 2016, the logarithm of the weights in equation 8. The prior is N(0, I) if not given.
    """
    latent = reparameterize(posterior.mean, posterior.log_variance, noise)
    return _log_prior_ratio(posterior, latent, noise, prior) - _distortions(vae, latent, target, likelihood)


def _log_prior_ratio(posterior: Posterior, latent: Tensor, noise: Tensor, prior: Prior | None = None) -> Tensor:
    """Return log p(z) - log q(z|x), (..., N, D) -> (..., N); (z - mean) / stddev is the noise."""
    if prior is None:  # the constants cancel
        return 0.5 * (noise.square() - latent.square() + posterior.log_variance).sum(-1)
    log_q = standard_normal_log_density(noise) - 0.5 * posterior.log_variance.sum(-1)
    return prior.log_density(latent) - log_q


def _distortions(vae: Vae, latent: Tensor, target: Tensor, likelihood: LikelihoodName) -> Tensor:
    """Return the distortion of K latents (K, N, D) of each image, (K, N)."""
    samples, images, size = latent.shape
    repeated = target.expand(samples, *target.shape).flatten(0, 1)
    return distortion(vae, latent.reshape(-1, size), repeated, likelihood).reshape(samples, images)


def iw_nll(log_weights: Tensor) -> Tensor:
    """Return -log of the mean importance weight, (K, N) -> (N,): an upper bound on -log p(x), tight as K grows."""
    return math.log(log_weights.shape[0]) - log_weights.logsumexp(0)
