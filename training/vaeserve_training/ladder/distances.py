"""How near generated images are to real ones: as a distribution, in fidelity and coverage, and one by one."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_CHUNK = 500  # rows of a table of distances held at once
NEIGHBOURS = 3  # Kynkaanniemi et al. 2019, section 4
_OUTLIERS = 0.1  # share of real samples that `core_precision` leaves out


class _Features(nn.Module):
    """Hands torchmetrics features instead of images, so that each set goes through the network once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets of features, (N, F) and (M, F).

    Heusel et al. 2017, section 2. It depends on the network that made the features and falls with the number of
    samples: compare only figures of one network and one number of samples.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: PLC0415 - takes a second that workers need not spend

    metric = FrechetInceptionDistance(feature=_Features(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


class PrecisionRecall(NamedTuple):
    """Share of generated samples that lie among the real ones, and of real ones that lie among the generated.

    `core_precision` leaves out the tenth of the balls that are widest: an outlier's nearest neighbours are far, so its
    ball takes in much that is like nothing real.
    """

    precision: float
    recall: float
    core_precision: float


def precision_recall(real: Tensor, generated: Tensor) -> PrecisionRecall:
    """Return improved precision and recall (Kynkaanniemi et al. 2019, equation 2) of features (N, F), k = 3.

    Each set's region is the union of balls around its members that reach to their third nearest neighbour.
    """
    radius = _radii(real)
    core_radius = torch.where(radius <= radius.quantile(1 - _OUTLIERS), radius, -1)  # a ball that nothing lies in
    precision, core_precision = _shares_inside(generated, real, radius, core_radius)
    (recall,) = _shares_inside(real, generated, _radii(generated))
    return PrecisionRecall(precision, recall, core_precision)


def _radii(members: Tensor) -> Tensor:
    """Return each member's distance to its third nearest neighbour, (N,)."""
    chunks = torch.split(members, _CHUNK)
    found = [torch.cdist(chunk, members).topk(NEIGHBOURS + 1, dim=1, largest=False).values for chunk in chunks]
    return torch.cat(found)[:, NEIGHBOURS]  # the nearest is the member itself


def _shares_inside(points: Tensor, members: Tensor, *radii: Tensor) -> list[float]:
    """Return, for each set of radii (N,), the share of points that lie in the ball of any of the N members."""
    inside: list[list[Tensor]] = [[] for _ in radii]
    for chunk in torch.split(points, _CHUNK):
        distance = torch.cdist(chunk, members)
        for found, radius in zip(inside, radii, strict=True):
            found.append((distance <= radius).any(1))
    return [float(torch.cat(found).double().mean()) for found in inside]


class Nearest(NamedTuple):
    """Each image's nearest reference image: its number (N,) and the mean squared error between the two (N,)."""

    row: NDArray[np.int64]
    mse: NDArray[np.float64]


def nearest(images: Tensor, reference: Tensor) -> Nearest:
    """Find each image's nearest reference image by mean squared error, both (., C, H, W) in 0..1."""
    flat = reference.flatten(1)
    squares = flat.square().sum(1)
    rows, errors = [], []
    for chunk in torch.split(images.flatten(1), _CHUNK):
        row = (squares - 2 * chunk @ flat.T).argmin(1)
        rows.append(row)
        errors.append((chunk - flat[row]).square().mean(1))
    return Nearest(torch.cat(rows).numpy(), torch.cat(errors).double().numpy())


class Copies(NamedTuple):
    """An estimated share of copies, and the standard error that it has where there are none."""

    share: float
    standard_error: float


def copied_share(images: Tensor, train: Tensor, held_out: Tensor) -> Copies:
    """Estimate the share of images that are copies of training images, from whose image is nearest to each.

    An image that is no copy is nearest to one of the N training images, of all N + M, with probability N / (N + M), as
    to any other N of them; a copy always is. So 0 is no memory of the training images, below 0 chance, and 1 nothing
    but copies. After the data-copying test of Meehan, Chaudhuri and Dasgupta 2020, which likewise compares distances
    to the training images.
    """
    to_train, to_held_out = nearest(images, train).mse, nearest(images, held_out).mse
    nearer = float(np.where(to_train == to_held_out, 0.5, to_train < to_held_out).mean())
    by_chance = len(train) / (len(train) + len(held_out))
    return Copies(
        share=(nearer - by_chance) / (1 - by_chance),
        standard_error=math.sqrt(len(train) / len(held_out) / len(images)),
    )
