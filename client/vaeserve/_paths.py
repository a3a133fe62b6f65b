"""Ways through latent space: the latents that `interpolate` and `traverse` decode."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from vaeserve._inputs import as_images, as_latents, is_stream
from vaeserve._results import Array, Encoding, Float32, ModelInfo
from vaeserve.errors import InvalidArgument, invalid

_SMALLEST_SINE = 1e-6  # below it two latents point the same or opposite way and the arc between them is not defined


class End(NamedTuple):
    """One end of a path: a latent, or an image whose posterior mean is the latent. One row either way."""

    is_image: bool
    row: Array


def as_ends(given: tuple[Any, Any], info: ModelInfo) -> tuple[End, End]:
    """Return what interpolate() was given as two ends; InvalidArgument unless each is one latent or one image."""
    return _as_end(given[0], "a", info), _as_end(given[1], "b", info)


def place(ends: tuple[End, End], codes: Encoding) -> tuple[End, End]:
    """Return the ends as latents: the images among them have been encoded, in order, to the rows of `codes`."""
    means = iter(codes.mean)
    a, b = (End(False, next(means)[np.newaxis]) if end.is_image else end for end in ends)
    return a, b


def as_one_latent(given: Any, info: ModelInfo) -> Array:
    """Return one latent as a row `(1, *latent_shape)`; InvalidArgument for none or several."""
    return _one_row(as_latents(given, info), "latent")


def interpolation(a: Array, b: Array, steps: SupportsIndex, *, spherical: bool) -> Float32:
    """Return `steps` latents from `a` to `b`, both included, float32 `(steps, *latent_shape)`.

    Linear, or along the great arc (Shoemake 1985; for latent spaces White 2016, arXiv:1609.04468), which keeps to the
    radii where a Gaussian prior has its mass. Ends that point the same or opposite way are joined by a straight line.
    """
    count = operator.index(steps)
    if count < 2:
        raise invalid("steps", f"steps is {count}; give 2 or more (both ends are included)")
    start, stop = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    t = np.linspace(0.0, 1.0, count)[:, np.newaxis]  # (steps, 1)
    weights = (1.0 - t, t)
    norms = np.linalg.norm(start) * np.linalg.norm(stop)
    if spherical and norms > 0:
        angle = np.arccos(np.clip(start @ stop / norms, -1.0, 1.0))
        if (sine := np.sin(angle)) > _SMALLEST_SINE:
            weights = (np.sin((1.0 - t) * angle) / sine, np.sin(t * angle) / sine)
    path = weights[0] * start + weights[1] * stop  # (steps, D)
    return path.astype(np.float32).reshape(count, *a.shape[1:])


def traversal(latent: Array, dim: int | Sequence[int], values: npt.ArrayLike) -> Float32:
    """Return copies of `latent` `(1, *latent_shape)` with element `dim` set to each of `values` in turn.

    `dim` is an index into `latent_shape`: an integer for a flat latent (or into its row-major order), or one integer
    for each axis. float32 `(len(values), *latent_shape)`.
    """
    shape = latent.shape[1:]
    targets = np.asarray(values, dtype=np.float32).reshape(-1)
    if not len(targets):
        raise invalid("values", "values are empty; give at least one")
    try:
        flat = operator.index(dim) if isinstance(dim, SupportsIndex) else int(np.ravel_multi_index(tuple(dim), shape))
    except (ValueError, TypeError):
        flat = latent.size
    if not -latent.size <= flat < latent.size:
        raise invalid("dim", f"dim is {dim}; a latent has shape {shape}")
    path = np.repeat(latent.reshape(1, -1).astype(np.float32), len(targets), axis=0)
    path[:, flat] = targets
    return path.reshape(len(targets), *shape)


def _as_end(given: Any, name: str, info: ModelInfo) -> End:
    if isinstance(given, Encoding):
        return End(False, _one_row(given.mean, name))
    if is_stream(given):
        raise invalid(name, f"{name} is a {type(given).__name__}; give one image, one latent or an Encoding of one row")
    latent, image = _try(as_latents, given, info), _try(as_images, given, info)
    if latent is not None and image is not None:
        raise invalid(name, f"{name} could be an image or a latent of {info.ref}; give client.encode({name}) instead")
    if latent is not None:
        return End(False, _one_row(latent, name))
    if image is not None:
        return End(True, _one_row(image, name))
    shape = np.shape(given)
    raise invalid(
        name,
        f"{name} has shape {shape}; model {info.ref} takes one image {info.image_shape} or one latent "
        f"{info.latent_shape}",
    )


def _try(fit: Any, given: Any, info: ModelInfo) -> Array | None:
    try:
        rows: Array = fit(given, info)
    except InvalidArgument:
        return None
    return rows


def _one_row(rows: Array, name: str) -> Array:
    if len(rows) != 1:
        raise invalid(name, f"{name} has {len(rows)} rows; give one")
    return rows
