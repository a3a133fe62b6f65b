"""How large the ladder is: every size of every step.

`QUICK` fits into ten minutes on two CPU cores; `FULL` takes the whole data set, convolutions and three seeds. Tests
bring a scale of their own.
"""

from __future__ import annotations

import math

from vaeserve_training.config import ModelConfig, PriorConfig, Section, TrainConfig, preset
from vaeserve_training.data import ImageData


class Scale(Section):
    """Sizes. Numbers of images are upper bounds: of a smaller data set all images are used."""

    name: str
    """How the report calls it."""
    seeds: tuple[int, ...]
    """Every system is trained once for each."""
    base: TrainConfig
    """Networks, loss and optimiser of steps 4 to 11, but for the length."""
    train_images: int
    """Training images of steps 4 to 11, and of the classifier."""
    growing_images: tuple[int, ...]
    """Step 10: numbers of training images."""
    steps: int
    """Optimiser steps of every system of steps 4 to 11, whatever the number of images."""
    snapshots: tuple[int, ...]
    """Steps after which the VAE is looked at on its way."""
    betas: tuple[float, ...]
    """Weights of the rate in steps 7 and 9; 1 is among them."""
    plane: ModelConfig
    """Step 11: the networks around two latents, deeper, since so narrow a code has to be folded."""
    deconvolution: ModelConfig
    """The decoder that memorises in steps 1 to 3; its latent size is the length of step 1's input."""
    constant_steps: int
    """Optimiser steps of step 1."""
    one_hot_images: tuple[int, ...]
    """Step 2: numbers of images; step 3 takes the last."""
    one_hot_steps: int
    """Step 2: the most optimiser steps."""
    vector_sizes: tuple[int, ...]
    """Step 3: dimensions of the code."""
    vector_steps: int
    """Step 3: optimiser steps."""
    samples: int
    """Images a side wherever two sets of images are compared."""
    prior: PriorConfig
    """Step 6: the flow that is fitted to codes."""
    draws: int
    """Draws of each estimate of mutual information."""
    classifier_epochs: int
    """Passes of the classifier over its training images."""
    neg_elbo_bound_nats: float
    """Step 11: the -ELBO of unseen images that a VAE of this size should reach."""

    def within(self, data: ImageData) -> Scale:
        """Return these sizes for a data set that may have fewer images, or images of another shape."""
        images = len(data.train)
        return self.model_copy(
            update={
                "base": self.base.with_changes(data={"image_shape": data.train.shape[1:]}),
                "train_images": min(self.train_images, images),
                "growing_images": _at_most(self.growing_images, images),
                "one_hot_images": _at_most(self.one_hot_images, images),
                "samples": min(self.samples, images, len(data.test)),
            }
        )


def _at_most(counts: tuple[int, ...], images: int) -> tuple[int, ...]:
    return tuple(sorted({min(count, images) for count in counts}))


QUICK = Scale(
    name="quick",
    seeds=(0,),
    base=preset("mnist-mlp"),
    train_images=10_000,
    growing_images=(1_000, 3_000, 10_000),
    steps=1500,
    snapshots=(0, 10, 30, 100, 300, 1000),
    betas=(0.1, 0.3, 1.0, 2.0, 4.0, 8.0),
    plane=ModelConfig(latent_size=2, channels=(), hidden=(400, 200, 100)),
    deconvolution=ModelConfig(latent_size=16, channels=(16, 32), hidden=(256,)),
    constant_steps=2000,
    one_hot_images=(1, 4, 16, 64),
    one_hot_steps=4000,
    vector_sizes=(1, 2, 4, 8, 16),
    vector_steps=600,
    samples=5_000,
    prior=PriorConfig(couplings=6, hidden=64, steps=600, batch_size=256),
    draws=5_000,
    classifier_epochs=3,
    neg_elbo_bound_nats=120.0,
)

_PRESET = preset("mnist")

FULL = QUICK.model_copy(
    update={
        "name": "full",
        "seeds": (0, 1, 2),
        "base": _PRESET,
        "plane": ModelConfig(latent_size=2, hidden=(256, 128)),
        "train_images": 60_000,
        "growing_images": (1_000, 5_000, 60_000),
        "steps": _PRESET.optimiser.epochs * math.ceil(60_000 / _PRESET.optimiser.batch_size),
        "snapshots": (0, 10, 30, 100, 300, 1000),
        "vector_steps": 3_000,
        "samples": 10_000,
        "prior": PriorConfig(),
        "draws": 10_000,
        "neg_elbo_bound_nats": 96.0,
    }
)
