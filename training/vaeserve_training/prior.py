"""A learned prior: a small flow between N(0, I) and the aggregate posterior, which N(0, I) only approximates.

Latents that the decoder knows well come from the aggregate posterior q(z), the mean of q(z|x) over the images. Where it
differs from N(0, I), samples fall into gaps between digits, and the rate pays for the difference. The flow is fitted
to q(z) after training and changes neither encoder nor decoder: the model p(x|z) p(z) gets another p(z).

The flow is a RealNVP (Dinh, Sohl-Dickstein and Bengio 2017): affine couplings, each followed by a permutation of the
latents, then a rescaling of each latent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from vaeserve_training.config import ConfigError, PriorConfig
from vaeserve_training.models import LATENT_RANGE
from vaeserve_training.objectives import standard_normal_log_density

MAX_LOG_SCALE = 1.0  # of one coupling: what rounding does to a latent stays small even behind all of them


class Coupling(nn.Module):
    """y = P [a, b * exp(s(a)) + t(a)] of the halves a, b of a vector (N, D); P is a fixed permutation."""

    permutation: Tensor

    def __init__(self, latent_size: int, hidden: int, permutation: Tensor) -> None:
        super().__init__()
        self.kept = latent_size // 2
        self.body = nn.Sequential(
            nn.Linear(self.kept, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, 2 * (latent_size - self.kept)),
        )  # fmt: skip
        last = self.body[-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)  # the coupling starts as its permutation
        self.register_buffer("permutation", permutation)

    def forward(self, before: Tensor) -> Tensor:
        """Return the vectors after the coupling, (N, D)."""
        kept, moved = before[:, : self.kept], before[:, self.kept :]
        shift, log_scale = self._affine(kept)
        return torch.cat([kept, moved * log_scale.exp() + shift], dim=1)[:, self.permutation]

    def inverse(self, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors before the coupling, (N, D), and log |det| of this direction's Jacobian, (N,)."""
        ordered = after[:, self.permutation.argsort()]
        kept, moved = ordered[:, : self.kept], ordered[:, self.kept :]
        shift, log_scale = self._affine(kept)
        return torch.cat([kept, (moved - shift) * (-log_scale).exp()], dim=1), -log_scale.sum(1)

    def _affine(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.body(kept).chunk(2, dim=1)
        return shift, MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE)


class FlowPrior(nn.Module):
    """p(z) as a flow. As a module it is the bundle's third graph: noise (N, D) -> latent (N, D)."""

    mean: Tensor
    stddev: Tensor

    def __init__(self, config: PriorConfig, latent_size: int) -> None:
        """Make the flow that is N(0, I) but for its permutations; weights by PyTorch's global generator."""
        super().__init__()
        if latent_size < 2:
            raise ConfigError(f"a coupling moves some latents by the others; {latent_size} latent has no others")
        self.latent_size = latent_size
        rng = np.random.Generator(np.random.Philox(config.seed))
        # Reversed after every other coupling, so that each pair moves all latents; shuffled between the pairs.
        reverse = np.arange(latent_size)[::-1]
        orders = [rng.permutation(latent_size) if number % 2 else reverse.copy() for number in range(config.couplings)]
        self.couplings = nn.ModuleList(
            Coupling(latent_size, config.hidden, torch.from_numpy(order)) for order in orders
        )
        self.register_buffer("mean", torch.zeros(latent_size))
        self.register_buffer("stddev", torch.ones(latent_size))

    def forward(self, noise: Tensor) -> Tensor:
        """Return the latents for N(0, I) noise; both are clamped to LATENT_RANGE, as the decoder clamps its input."""
        return self.push(noise.clamp(*LATENT_RANGE)).clamp(*LATENT_RANGE)

    def push(self, noise: Tensor) -> Tensor:
        """Return the flow's latents (N, D), unclamped: the inverse of `pull`."""
        latent = noise
        for coupling in self.couplings:
            latent = coupling(latent)
        return self.mean + self.stddev * latent

    def pull(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise (N, D) that these latents come from, and log |det d noise / d latent|, (N,)."""
        noise = (latent - self.mean) / self.stddev
        log_det = -self.stddev.log().sum().expand(len(latent))
        for coupling in reversed(self.couplings):
            assert isinstance(coupling, Coupling)
            noise, change = coupling.inverse(noise)
            log_det = log_det + change
        return noise, log_det

    def log_density(self, latent: Tensor) -> Tensor:
        """Return log p(z) in nats, (..., D) -> (...)."""
        noise, log_det = self.pull(latent.reshape(-1, self.latent_size))
        return (standard_normal_log_density(noise) + log_det).reshape(latent.shape[:-1])
