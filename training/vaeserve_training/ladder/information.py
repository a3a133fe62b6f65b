"""How much a noisy code says, and how far all codes together are from the prior.

Everything is estimated from posteriors: N diagonal Gaussians q(z|x_n), whose average is the aggregate posterior
q(z) = 1/N sum_n q(z|x_n). Computed in float64; information is in nats, unless a name says bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from vaeserve_training.compute import cpu_threads
from vaeserve_training.objectives import LOG_2PI, reparameterize
from vaeserve_training.randomness import generator

_GRID_POINTS = (512, 4096)  # of the quadrature of `marginal_kl`, fewest and most
_NOISE_NODES = 64  # of the quadrature of `channel_information`
_INPUTS_CHUNK = 32  # inputs of it whose nodes are held against all inputs at once
_CHUNK = 500  # rows of an N x N table of densities held at once

_AUC_HIDDEN = 128
_AUC_STEPS = 600
_AUC_BATCH = 256


def bits(nats: float) -> float:
    """Return nats as bits."""
    return nats / math.log(2)


@dataclass(frozen=True)
class MutualInformation:
    """An estimate of I(x; z) in nats, its standard error, and what none from so many posteriors can exceed."""

    nats: float
    standard_error_nats: float
    ceiling_nats: float  # log N

    @property
    def saturation(self) -> float:
        """Share of the ceiling that the estimate reaches; near 1 it tells of N and not of the model."""
        return self.nats / self.ceiling_nats


def mutual_information(mean: Tensor, stddev: Tensor, *, draws: int, seed: int) -> MutualInformation:
    """Estimate I(x; z) = E[log q(z|x) - log q(z)] for x uniform over the N posteriors, (N, D) each.

    z is drawn `draws` times, from each posterior equally often, give or take one; q(z) is the mixture of all N, so the
    estimate is unbiased for these N inputs, and at most log N (Hoffman and Johnson 2016, section 3).
    """
    mean, stddev = mean.double(), stddev.double()
    random = generator(seed)
    row = torch.randperm(len(mean), generator=random)[torch.arange(draws) % len(mean)]
    noise = torch.randn((draws, mean.shape[1]), generator=random, dtype=torch.float64)
    own = -0.5 * (noise.square() + LOG_2PI).sum(1) - stddev[row].log().sum(1)
    log_ratio = own - _log_mixture(mean[row] + stddev[row] * noise, mean, stddev)
    error = float(log_ratio.std()) / math.sqrt(draws)
    return MutualInformation(float(log_ratio.mean()), error, math.log(len(mean)))


def _log_mixture(latent: Tensor, mean: Tensor, stddev: Tensor) -> Tensor:
    """Return log q(z) of each of M latents: (M, D) -> (M,)."""
    precision = stddev**-2
    constant = -0.5 * (precision * mean.square() + LOG_2PI).sum(1) - stddev.log().sum(1)
    parts = []
    for chunk in torch.split(latent, _CHUNK):
        log_density = chunk @ (precision * mean).T - 0.5 * chunk.square() @ precision.T + constant  # (chunk, N)
        parts.append(log_density.logsumexp(1) - math.log(len(mean)))
    return torch.cat(parts)


def channel_information(inputs: Tensor, stddev: float) -> float:
    """Return I(x; y) in nats of y = x + N(0, stddev^2), x uniform over the inputs (N,), by Gauss-Hermite quadrature.

    It is E[log p(y|x) - log p(y)] again, with the noise at fixed nodes instead of drawn: information of 1e-5 nats,
    which is what unit noise leaves of two near names, would drown in the scatter of draws.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(_NOISE_NODES))
    standardised = inputs.double() / stddev
    total = torch.zeros((), dtype=torch.float64)
    for chunk in torch.split(standardised, _INPUTS_CHUNK):
        received = chunk[:, None] + nodes  # (chunk, nodes)
        log_density = -0.5 * (received[..., None] - standardised).square()  # (chunk, nodes, N)
        log_ratio = -0.5 * nodes.square() - log_density.logsumexp(-1) + math.log(len(inputs))
        total += (log_ratio * weights).sum()
    return float(total) / len(inputs) / math.sqrt(2 * math.pi)


def gaussian_inputs(count: int, variance: float) -> Tensor:
    """Return numbers (count,) at equal steps of a Gaussian's cumulative probability, scaled to that very variance."""
    places = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    inputs: Tensor = places * math.sqrt(variance / float(places.var(correction=0)))
    return inputs


def kl_by_sampling(mean: Tensor, log_variance: Tensor, *, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Estimate KL(q(z|x) || N(0, I)) of each posterior by E[log q(z|x) - log p(z)]: (N,), and standard errors (N,)."""
    random = generator(seed)
    total, squares = torch.zeros(2, len(mean), dtype=torch.float64)
    for _ in range(draws):
        noise = torch.randn(mean.shape, generator=random, dtype=torch.float64)
        latent = reparameterize(mean.double(), log_variance.double(), noise)
        # The constants cancel, and (z - mean) / stddev is the noise.
        log_ratio = 0.5 * (latent.square() - noise.square() - log_variance.double()).sum(1)
        total += log_ratio
        squares += log_ratio.square()
    estimate = total / draws
    variance = (squares / draws - estimate.square()).clamp(min=0) * draws / (draws - 1)
    return estimate, (variance / draws).sqrt()


def marginal_kl(mean: Tensor, stddev: Tensor) -> Tensor:
    """Return KL(q(z_d) || N(0, 1)) of each latent d in nats, (N, D) -> (D,), by quadrature over the 1-D mixture."""
    columns = zip(mean.double().T, stddev.double().T, strict=True)
    return torch.tensor([_kl_to_unit_gaussian(*column) for column in columns], dtype=torch.float64)


def _kl_to_unit_gaussian(mean: Tensor, stddev: Tensor) -> float:
    low, high = float((mean - 8 * stddev).min()), float((mean + 8 * stddev).max())
    fewest, most = _GRID_POINTS
    points = min(max(int(3 * (high - low) / float(stddev.median())), fewest), most)
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for centre, width in zip(torch.split(mean, _CHUNK), torch.split(stddev, _CHUNK), strict=True):
        standardised = (grid - centre[:, None]) / width[:, None]  # (chunk, points)
        density += (torch.exp(-0.5 * standardised.square()) / width[:, None]).sum(0)
    density /= len(mean) * math.sqrt(2 * math.pi)
    log_ratio = density.clamp(min=1e-300).log() + 0.5 * (grid.square() + LOG_2PI)
    return float(torch.trapezoid(density * log_ratio, grid))


def separability(first: Tensor, second: Tensor, *, seed: int) -> float:
    """Return the AUC with which a small classifier tells two sets of latents (N, D) apart, on halves it never saw.

    0.5: they cannot be told apart; 1: they never overlap. A lower bound on what the best classifier could do.
    """
    latent = torch.cat([first, second]).float()
    label = torch.cat([torch.zeros(len(first)), torch.ones(len(second))])
    train, held_out = torch.randperm(len(latent), generator=generator(seed)).chunk(2)
    latent = (latent - latent[train].mean(0)) / latent[train].std(0).clamp(min=1e-6)
    classifier = _fit_classifier(latent[train], label[train], seed)
    with torch.no_grad():
        score = classifier(latent[held_out]).squeeze(1)
    return float(binary_auroc(score, label[held_out].int()))


def _fit_classifier(latent: Tensor, label: Tensor, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = nn.Sequential(
            nn.Linear(latent.shape[1], _AUC_HIDDEN), nn.SiLU(),
            nn.Linear(_AUC_HIDDEN, _AUC_HIDDEN), nn.SiLU(),
            nn.Linear(_AUC_HIDDEN, 1),
        )  # fmt: skip
    random = generator(seed)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _AUC_STEPS)
    with cpu_threads(1):  # the steps are too small to share
        for _ in range(_AUC_STEPS):
            row = torch.randint(len(latent), (_AUC_BATCH,), generator=random)
            loss = nn.functional.binary_cross_entropy_with_logits(classifier(latent[row]).squeeze(1), label[row])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return classifier


def capacity_bits(signal_to_noise: float) -> float:
    """Return the capacity 0.5 log2(1 + S/N) of a Gaussian channel, S/N a ratio of variances (Shannon 1948)."""
    return 0.5 * math.log2(1 + signal_to_noise)


def confusion_rate(gap: float, stddev: float) -> float:
    """Return how often two equally likely numbers, `gap` apart, are confused under Gaussian noise at best."""
    return 0.5 * math.erfc(gap / 2 / stddev / math.sqrt(2))
