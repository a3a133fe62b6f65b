"""The optimiser, its schedule and the moving average of the weights: state that a resumed run takes up again.

Learning rate and rate weight are functions of the step number, so they need no state of their own.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from vaeserve_training.config import ObjectiveConfig, OptimiserConfig

Averaged = TypeVar("Averaged", bound=nn.Module)


def make_optimiser(config: OptimiserConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Return the fused optimiser over the model's parameters."""
    algorithm = torch.optim.AdamW if config.algorithm == "adamw" else torch.optim.Adam
    return algorithm(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, eps=config.epsilon, fused=True
    )


def learning_rate(config: OptimiserConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of step `step` (from 0): a linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "iwae":
        return config.learning_rate * 10 ** (-iwae_stage(step * config.epochs // total_steps) / 7)
    share = cosine(step - config.warmup_steps, total_steps - config.warmup_steps)
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * share)


def cosine(step: int, steps: int) -> float:
    """Return 1 at step 0, 0 at the last of `steps`, and half a cosine between."""
    return 0.5 * (1 + math.cos(math.pi * min(step / max(1, steps - 1), 1.0)))


def iwae_stage(epoch: int) -> int:
    """Return the stage i that epoch `epoch` (from 0) lies in, where stage i has 3^i epochs (Burda et al. 2016)."""
    stage, end = 0, 1
    while epoch >= end:
        stage += 1
        end += 3**stage
    return stage


def rate_weight(config: ObjectiveConfig, step: int) -> float:
    """Return the weight of the rate at step `step` (from 0): beta, after its own linear warm-up."""
    if step < config.rate_warmup_steps:
        return config.beta * (step + 1) / config.rate_warmup_steps
    return config.beta


def make_average(config: OptimiserConfig, module: Averaged) -> Averaged | None:
    """Return the copy of the model that will hold the averaged weights, None if the average is off."""
    return copy.deepcopy(module).eval().requires_grad_(False) if config.ema_decay else None


@torch.no_grad()
def update_average(config: OptimiserConfig, average: nn.Module, module: nn.Module, step: int) -> None:
    """Move the average towards the weights after step `step` (from 0); early steps weigh more, so that no start stays.

    The decay is min(ema_decay, (1 + step) / (10 + step)).
    """
    decay = min(config.ema_decay, (1 + step) / (10 + step))
    for averaged, current in zip(average.parameters(), module.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)
