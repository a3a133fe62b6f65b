"""The systems of the ladder, each a source of codes and a configuration: what differs between them is written here.

From `autoencoder` to `variational_autoencoder` nothing changes but the source of the codes.
"""

from __future__ import annotations

import math

from vaeserve_training.config import ObjectiveConfig, OptimiserConfig, TrainConfig
from vaeserve_training.ladder.codes import CodeName
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec

KNOWN_MSE = 1e-3  # an image is memorised if its mean squared error is at most this
_MSE = ObjectiveConfig(likelihood="mse")


def constant(scale: Scale, seed: int) -> Spec:
    """Return step 1: a constant input, one image, the mean squared error."""
    steps = scale.constant_steps
    snapshots = (0, *(step for step in (3, 10, 30, 100, 300, 1000) if step < steps), steps)
    config = _memorising(scale, scale.deconvolution.latent_size, images=1, seed=seed, steps=steps)
    config = config.with_changes(optimiser={"schedule": "cosine"})
    return Spec(codes="constant", config=config, snapshots=snapshots)


def one_hot(scale: Scale, images: int, seed: int) -> Spec:
    """Return step 2: each image has its own place in the code, and one place stays unused."""
    config = _memorising(scale, images + 1, images=images, seed=seed, steps=scale.one_hot_steps)
    return Spec(codes="one-hot", config=config, worst_mse=KNOWN_MSE)


def vectors(scale: Scale, codes: CodeName, size: int, seed: int) -> Spec:
    """Return step 3: as many images as step 2 at most, with real-valued codes of `size` numbers, drawn or learned."""
    config = _memorising(scale, size, images=scale.one_hot_images[-1], seed=seed, steps=scale.vector_steps)
    return Spec(codes=codes, config=config.with_changes(optimiser={"schedule": "cosine"}))


def autoencoder(scale: Scale, seed: int, images: int | None = None) -> Spec:
    """Return step 4: the encoder gives the code, and nothing disturbs it."""
    return Spec(codes="encoder", config=_as_base(scale, seed, images))


def variational_autoencoder(scale: Scale, seed: int, images: int | None = None, beta: float = 1.0) -> Spec:
    """Return step 5: the encoder gives a Gaussian, a draw from it is the code, and its rate is charged for."""
    config = _as_base(scale, seed, images)
    if beta != 1:
        config = config.with_changes(objective={"beta": beta})
    looked_at = beta == 1 and images is None
    return Spec(codes="encoder with noise", config=config, snapshots=scale.snapshots if looked_at else ())


def two_latents(scale: Scale, seed: int) -> Spec:
    """Return step 11's VAE whose latents fit on a page."""
    config = _as_base(scale, seed).with_changes(model=scale.plane.model_dump(), optimiser={"learning_rate": 2e-3})
    return Spec(codes="encoder with noise", config=config)


def literal_loss(scale: Scale, seed: int) -> Spec:
    """Return step 5's VAE with the loss as it is often written: mean squared error + KL."""
    return Spec(codes="encoder with noise", config=_as_base(scale, seed).with_changes(objective={"likelihood": "mse"}))


def learned_sigma(scale: Scale, seed: int) -> Spec:
    """Return the cure: the same squared error, weighed by a standard deviation that is learned."""
    objective = {"likelihood": "gaussian", "sigma": "learned"}
    return Spec(codes="encoder with noise", config=_as_base(scale, seed).with_changes(objective=objective))


def _as_base(scale: Scale, seed: int, images: int | None = None) -> TrainConfig:
    return _sized(scale.base, images or scale.train_images, seed, scale.steps)


def _memorising(scale: Scale, size: int, *, images: int, seed: int, steps: int) -> TrainConfig:
    """Return a configuration for codes of `size` numbers that sees all images at every step, at one learning rate."""
    # Not faster: a pixel that overshoots into the sigmoid's flat end stays there, and one is too many.
    optimiser = OptimiserConfig(
        algorithm="adam", learning_rate=1e-3, warmup_steps=0, schedule="constant", ema_decay=0.0, batch_size=images
    )
    model = scale.deconvolution.model_copy(update={"latent_size": size})
    base = scale.base.model_copy(update={"model": model, "objective": _MSE, "optimiser": optimiser})
    return _sized(base, images, seed, steps)


def _sized(base: TrainConfig, images: int, seed: int, steps: int) -> TrainConfig:
    """Return `base` for so many images, with as many whole epochs as come nearest to `steps` optimiser steps."""
    epochs = max(1, round(steps / math.ceil(images / base.optimiser.batch_size)))
    return base.with_changes(data={"limit_train": images}, optimiser={"epochs": epochs}, run={"seed": seed})
