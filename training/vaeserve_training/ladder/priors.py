"""What generation draws its latents from. A further prior is a further entry of `PRIORS`, and step 6 shows it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vaeserve_training.ladder.lab import Draw, Lab
from vaeserve_training.ladder.systems import System

Prior = Callable[[Lab, System, int, int], Tensor]  # lab, system, count, seed -> latents (count, D)


def unit_gaussian(lab: Lab, system: System, count: int, seed: int) -> Tensor:
    """Return draws from N(0, I), what a VAE is trained to be decoded from."""
    return lab.noise(count, system.latent_size, draw=Draw.PRIOR, seed=seed)


def fitted_gaussian(lab: Lab, system: System, count: int, seed: int) -> Tensor:
    """Return draws from one Gaussian with the mean and covariance of the system's codes of the training images."""
    noise = lab.noise(len(lab.train_pixels), system.latent_size, draw=Draw.POSTERIOR, seed=seed)
    codes = system.encode(lab.train_pixels, noise).double()
    jitter = 1e-6 * torch.eye(system.latent_size, dtype=torch.float64)
    factor: Tensor = torch.linalg.cholesky(codes.T.cov() + jitter)
    return (codes.mean(0) + unit_gaussian(lab, system, count, seed).double() @ factor.T).float()


UNIT = "N(0, I)"
FITTED = "Gaussian fitted to its codes"
PRIORS: dict[str, Prior] = {UNIT: unit_gaussian, FITTED: fitted_gaussian}
