"""FID-LeNet of a trained model's samples, under N(0, I) and under its fitted prior.

    vaeserve-train evaluate --run-dir runs/mnist --fid-samples 10000

The network is the ladder's classifier, trained anew on the model's own training images: figures compare between priors
and between models of one data set, and with no published FID.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaeserve_training.compute import as_tensor
from vaeserve_training.data import ImageData
from vaeserve_training.ladder import lenet
from vaeserve_training.ladder.distances import frechet_distance
from vaeserve_training.ladder.lenet import LadderDataError
from vaeserve_training.ladder.systems import intensity
from vaeserve_training.models import Vae
from vaeserve_training.prior import FlowPrior
from vaeserve_training.randomness import Stream, generator
from vaeserve_training.report import EvaluationError, Fid

_EPOCHS = 3
_BATCH = 500

Advance = Callable[[int], None]


def work(data: ImageData) -> int:
    """Return the number of steps that `fid_lenet` tells `advance` in all."""
    return lenet.total_steps(len(data.train), _EPOCHS)


def fid_lenet(
    vae: Vae,
    data: ImageData,
    samples: int,
    *,
    prior: FlowPrior | None = None,
    seed: int = 0,
    advance: Advance | None = None,
) -> Fid:
    """Train the classifier, draw `samples` latents from each prior, and compare their images with training images.

    Every image is a decoder's mean, so blur counts as distance. Raises EvaluationError if there are fewer images or no
    more samples than features, or if the images have no labels.
    """
    try:
        _, test_labels = lenet.labels_of(data)
    except LadderDataError as error:
        raise EvaluationError(
            f"data set {data.name} has no labels to train FID-LeNet's classifier on; leave fid_samples out"
        ) from error
    most = min(len(data.train), len(data.test))
    if not lenet.FEATURES < samples <= most:
        raise EvaluationError(
            f"fid_samples is {samples}; the Gaussians of {lenet.FEATURES} features need more samples than that, and "
            f"{data.name} has {len(data.train)} training and {len(data.test)} test images to compare with: choose "
            f"{lenet.FEATURES + 1} to {most}"
        )
    device = next(vae.parameters()).device
    classifier = lenet.train(data, images=len(data.train), epochs=_EPOCHS, device=device.type, advance=advance)

    def features(images: NDArray[np.uint8]) -> Tensor:
        return classifier.features(intensity(as_tensor(images)))

    real = features(data.train[:samples])
    noise = torch.randn(samples, vae.latent_size, generator=generator(seed, Stream.GENERATED))

    def distance(latent: Tensor) -> float:
        return frechet_distance(real, classifier.features(_decode(vae, latent)))

    with torch.no_grad():
        fitted = None if prior is None else distance(prior(noise.to(device)))
    return Fid(
        samples=samples,
        standard=distance(noise),
        fitted=fitted,
        test=frechet_distance(real, features(data.test[:samples])),
        accuracy=classifier.accuracy(intensity(as_tensor(data.test)), test_labels),
    )


@torch.no_grad()
def _decode(vae: Vae, latent: Tensor) -> Tensor:
    """Return the images in 0..1 (N, C, H, W) on the CPU."""
    device = next(vae.parameters()).device
    vae.eval()
    return torch.cat([vae.decoder(batch.to(device)).float().cpu() for batch in torch.split(latent, _BATCH)])
