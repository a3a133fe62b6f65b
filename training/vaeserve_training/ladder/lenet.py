"""FID-LeNet: the small classifier in whose feature space generated images are compared with real ones.

The usual network for that task knows colour photographs and is fetched from elsewhere; this one is trained here, on the
images at hand, in seconds. So its distances compare systems of one ladder, and nothing else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaeserve_training.compute import as_tensor, choose_device, cpu_threads
from vaeserve_training.data import ImageData
from vaeserve_training.ladder.systems import intensity
from vaeserve_training.ladder.training import Advance
from vaeserve_training.randomness import Stream, generator, seed_of

BATCH_SIZE = 64
FEATURES = 84
_LEARNING_RATE = 2e-3
_BATCH = 500  # images at once where nothing is trained


class LadderDataError(ValueError):
    """A data set that the ladder cannot climb; the message says what it lacks."""


class LeNet(nn.Module):
    """Images (N, C, H, W) in 0..1 -> class scores (N, K), by way of 84 features (LeCun et al. 1998, with ReLU)."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), 120), nn.ReLU(),
            nn.Linear(120, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return the class scores."""
        scores: Tensor = self.head(self.body(image))
        return scores

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features (N, 84) of images in 0..1."""
        return torch.cat([self.body(batch) for batch in torch.split(images, _BATCH)])

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probability (N, K) of each class."""
        return torch.cat([self(batch).softmax(1) for batch in torch.split(images, _BATCH)])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images whose likeliest class is their label."""
        return float((self.probabilities(images).argmax(1) == labels).double().mean())


def labels_of(data: ImageData) -> tuple[Tensor, Tensor]:
    """Return the labels of the training and of the test images, (N,) and (M,); LadderDataError if there are none."""
    if data.train_labels is None or data.test_labels is None:
        raise LadderDataError(
            f"data set {data.name} has no labels; the ladder measures generated images in the feature space of a "
            "classifier, so it needs a data set with labels"
        )
    return torch.tensor(data.train_labels, dtype=torch.int64), torch.tensor(data.test_labels, dtype=torch.int64)


def build(data: ImageData) -> LeNet:
    """Return an untrained classifier for the data set's classes."""
    channels, height, width = data.train.shape[1:]
    return LeNet((channels, height, width), int(labels_of(data)[0].max()) + 1)


def total_steps(images: int, epochs: int) -> int:
    """Return the number of optimiser steps of `train`."""
    return -(-images // BATCH_SIZE) * epochs


def train(data: ImageData, *, images: int, epochs: int, device: str, advance: Advance | None = None) -> LeNet:
    """Train the classifier on the first `images` training images and return it on the CPU."""
    with cpu_threads(1):  # see workshop.py
        return _train(data, images, epochs, choose_device(device), advance)


def _train(data: ImageData, images: int, epochs: int, target: torch.device, advance: Advance | None) -> LeNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0, Stream.WEIGHTS))
        network = build(data).to(target)
    pixels = as_tensor(data.train[:images]).to(target)
    labels = labels_of(data)[0][:images].to(target)
    optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps(len(pixels), epochs))
    for epoch in range(epochs):
        order = torch.randperm(len(pixels), generator=generator(0, Stream.SHUFFLE, epoch)).to(target)
        for rows in torch.split(order, BATCH_SIZE):
            loss = F.cross_entropy(network(intensity(pixels[rows])), labels[rows])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            if advance:
                advance(1)
    return network.cpu().eval().requires_grad_(False)
