"""What generation draws its latents from. A further prior is a further entry of `PRIORS`, and step 6 shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from vaeserve_training.compute import cpu_threads
from vaeserve_training.ladder.lab import Draw, Lab
from vaeserve_training.ladder.systems import System
from vaeserve_training.prior_fit import fit_flow

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


def fitted_flow(lab: Lab, system: System, count: int, seed: int) -> Tensor:
    """Return draws from a flow fitted to the system's codes of the training images: the bundle's prior, prior.py."""
    config = lab.scale.prior.model_copy(update={"seed": seed})
    with cpu_threads(1):
        flow = fit_flow(system.posteriors(lab.train_pixels), config, log_level=logging.DEBUG)
        latent: Tensor = flow(unit_gaussian(lab, system, count, seed))
    return latent


UNIT = "N(0, I)"
FITTED = "Gaussian fitted to its codes"
FLOW = "flow fitted to its codes"
PRIORS: dict[str, Prior] = {UNIT: unit_gaussian, FITTED: fitted_gaussian, FLOW: fitted_flow}
