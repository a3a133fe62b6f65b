"""What the steps measure with: the images, the trained systems, the classifier, and random numbers that repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vaeserve_training import evaluate
from vaeserve_training.compute import as_tensor
from vaeserve_training.data import ImageData
from vaeserve_training.evaluate import Bound
from vaeserve_training.ladder import lenet
from vaeserve_training.ladder.cache import Cache, Entry, system_key, trained_system
from vaeserve_training.ladder.distances import Copies, copied_share, frechet_distance, precision_recall
from vaeserve_training.ladder.lenet import LeNet
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec, System, intensity
from vaeserve_training.ladder.training import Trained
from vaeserve_training.randomness import generator


class Draw(IntEnum):
    """What random numbers of a measurement are for; apart from the streams of training."""

    PRIOR = 100
    POSTERIOR = 101
    PAIRS = 102


class Quality(NamedTuple):
    """How images stand to the data: distance of distributions, fidelity and coverage."""

    fid: float
    precision: float
    core_precision: float
    recall: float


@dataclass
class Lab:
    """One run of the ladder. `advance` is told the optimiser steps taken."""

    scale: Scale
    data: ImageData
    out: Path
    device: str = "auto"
    advance: Callable[[int], None] | None = None

    @property
    def cache(self) -> Cache:
        """The trained networks."""
        return Cache(self.out / "cache")

    @cached_property
    def train_pixels(self) -> Tensor:
        """The training images of steps 4 to 11, uint8 (N, C, H, W)."""
        return as_tensor(self.data.train[: self.scale.train_images])

    @cached_property
    def test_pixels(self) -> Tensor:
        """The images that no system was trained on, uint8 (M, C, H, W)."""
        return as_tensor(self.data.test)

    @cached_property
    def test_labels(self) -> Tensor:
        """Their labels (M,)."""
        return lenet.labels_of(self.data)[1]

    def trained(self, spec: Spec) -> Trained:
        """Return a trained system, from the cache if it is there."""
        return trained_system(self.cache, spec, self.data, device=self.device, advance=self.advance)

    def per_seed(self, make: Callable[[Scale, int], Spec]) -> list[Trained]:
        """Return the trained system of each seed."""
        return [self.trained(make(self.scale, seed)) for seed in self.scale.seeds]

    @cached_property
    def classifier(self) -> LeNet:
        """FID-LeNet, one for all seeds, so that their distances compare."""

        def make() -> Entry:
            network = lenet.train(
                self.data,
                images=self.scale.train_images,
                epochs=self.scale.classifier_epochs,
                device=self.device,
                advance=self.advance,
            )
            return Entry(network.state_dict(), {})

        network = lenet.build(self.data)
        network.load_state_dict(self.cache.get(self.classifier_key, make).tensors)
        return network.eval().requires_grad_(False)

    @property
    def classifier_key(self) -> dict[str, object]:
        """What the classifier depends on."""
        size = {"images": self.scale.train_images, "epochs": self.scale.classifier_epochs}
        return {"classifier": size | {"sha256": self.data.sha256}}

    def missing(self, specs: Iterable[Spec]) -> list[Spec]:
        """Return those of the specs whose systems are still to be trained, each once."""
        keys = {spec.model_dump_json(): spec for spec in specs}
        return [spec for spec in keys.values() if not self.cache.has(system_key(spec, self.data))]

    @cached_property
    def real_features(self) -> Tensor:
        """Features of the first `scale.samples` training images, with which all others are compared."""
        return self.classifier.features(intensity(self.train_pixels[: self.scale.samples]))

    def fid(self, images: Tensor) -> float:
        """Return the FID-LeNet of `scale.samples` images in 0..1 to as many training images."""
        return frechet_distance(self.real_features, self._features(images))

    def quality(self, images: Tensor) -> Quality:
        """Compare `scale.samples` images in 0..1 with as many training images in every way; `fid` is far quicker."""
        features = self._features(images)
        among = precision_recall(self.real_features, features)
        return Quality(
            fid=frechet_distance(self.real_features, features),
            precision=among.precision,
            core_precision=among.core_precision,
            recall=among.recall,
        )

    def copied(self, images: Tensor) -> Copies:
        """Return the estimated share of copies among images in 0..1, by all training and all unseen images."""
        return copied_share(images, intensity(self.train_pixels), intensity(self.test_pixels))

    def _features(self, images: Tensor) -> Tensor:
        if len(images) != self.scale.samples:
            raise ValueError(f"{len(images)} images; figures compare at {self.scale.samples} only")
        return self.classifier.features(images)

    @cached_property
    def floor(self) -> Quality:
        """The same of images that are real: what a perfect generator would reach with this many samples."""
        return self.quality(intensity(self.test_pixels[: self.scale.samples]))

    def bound(self, system: System) -> Bound:
        """Return -ELBO, rate, distortion and posteriors of the test images."""
        return evaluate.bound(system.vae, self.data.test, system.spec.config.objective.likelihood)

    def noise(self, rows: int, size: int, *, draw: Draw, seed: int) -> Tensor:
        """Return a draw from N(0, I), (rows, size)."""
        return torch.randn(rows, size, generator=generator(seed, draw))

    def pairs(self, count: int, below: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return two lists of `count` numbers in 0 .. below - 1, different at each place."""
        random = generator(seed, Draw.PAIRS)
        first = torch.randint(below, (count,), generator=random)
        return first, (first + torch.randint(1, below, (count,), generator=random)) % below
