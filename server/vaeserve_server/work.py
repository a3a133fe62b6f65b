"""The rows of one call on their way through a graph: conversion to float32, seeded noise, conversion back.

All of it runs in the batcher's threads, piece by piece. Noise is keyed by (seed, row), so the pieces of a call need not
know of each other, and no batching changes a bit of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vaeserve_server import noise
from vaeserve_server.batcher import Outputs
from vaeserve_server.checks import Array, Floats, first
from vaeserve_server.errors import GraphRunError, InvalidInputError

DType = np.dtype[Any]

_LEVELS = np.float32(255)

FLOAT32, FLOAT16, UINT8 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint8)


class Noise(NamedTuple):
    """Which rows of which seed's stream; see the seed contract in vae.proto."""

    seed: int
    first_row: int


class EncodeWork:
    """The images of one Encode call."""

    __slots__ = ("_draw", "_images", "_latent_shape", "rows")

    def __init__(self, images: Array, draw: Noise | None, latent_shape: tuple[int, ...]) -> None:
        self.rows = len(images)
        self._images = images
        self._draw = draw
        self._latent_shape = latent_shape

    def write(self, start: int, stop: int, out: Floats) -> None:
        """Write the images, in 0..1."""
        out[...] = self._images[start:stop]
        if self._images.dtype == UINT8:
            np.divide(out, _LEVELS, out=out)  # of what is float32 already: NumPy would convert piece by piece

    def finish(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> Outputs:
        """Return mean and stddev, and the latents if they are wanted."""
        mean, stddev = outputs
        if self._draw is None:
            return mean, stddev
        latents = standard_normal(self._draw, start, len(mean), self._latent_shape)
        latents *= stddev
        latents += mean
        return mean, stddev, latents

    def refuse(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> GraphRunError:
        """Blame the graph: no image in 0..1 is at fault."""
        return GraphRunError("the encoder's output is not finite")


class DecodeWork:
    """The latents of one Decode call. `field` is what a caller is to change if they are too extreme."""

    __slots__ = ("_field", "_image_dtype", "_latents", "rows")

    def __init__(self, latents: Array, image_dtype: DType, field: str = "latents") -> None:
        self.rows = len(latents)
        self._latents = latents
        self._image_dtype = image_dtype
        self._field = field

    def write(self, start: int, stop: int, out: Floats) -> None:
        """Write the latents."""
        out[...] = self._latents[start:stop]

    def finish(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> Outputs:
        """Return the images in the type that was asked for."""
        return (_as_images(outputs[0], self._image_dtype),)

    def refuse(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> InvalidInputError:
        """Name the row that drove the decoder out of float32."""
        return _too_far_out(self._field, start, batch, outputs[0])


class NoiseWork:
    """The draws of one Sample call from the standard normal prior, on their way through the decoder."""

    __slots__ = ("_draw", "_image_dtype", "_latent_shape", "_temperature", "rows")

    def __init__(
        self,
        count: int,
        draw: Noise,
        temperature: float,
        latent_shape: tuple[int, ...],
        image_dtype: DType,
    ) -> None:
        self.rows = count
        self._draw = draw
        self._temperature = np.float32(temperature)
        self._latent_shape = latent_shape
        self._image_dtype = image_dtype

    def write(self, start: int, stop: int, out: Floats) -> None:
        """Write noise times temperature."""
        np.multiply(standard_normal(self._draw, start, stop - start, self._latent_shape), self._temperature, out=out)

    def finish(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> Outputs:
        """Return the images and the latents that they came from."""
        return _as_images(outputs[0], self._image_dtype), batch

    def refuse(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> InvalidInputError:
        """Name the row that drove the decoder out of float32."""
        return _too_far_out("temperature", start, batch, outputs[0])


class PriorWork(NoiseWork):
    """The draws of one Sample call from the fitted prior, on their way through its graph."""

    __slots__ = ()

    def __init__(self, count: int, draw: Noise, temperature: float, latent_shape: tuple[int, ...]) -> None:
        super().__init__(count, draw, temperature, latent_shape, FLOAT32)

    def finish(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> Outputs:
        """Return the latents."""
        return (outputs[0],)

    def refuse(self, start: int, batch: Floats, outputs: Sequence[Floats]) -> InvalidInputError:
        """Blame the temperature."""
        return InvalidInputError("temperature", "temperature is so high that the prior's latents are not finite")


def standard_normal(draw: Noise, start: int, rows: int, latent_shape: tuple[int, ...]) -> Floats:
    """Return noise for rows start..start + rows of a call, float32 `(rows, *latent_shape)`."""
    size = math.prod(latent_shape)
    return noise.standard_normal(draw.seed, draw.first_row + start, rows, size).reshape(rows, *latent_shape)


def _as_images(images: Floats, dtype: DType) -> Array:
    """Return float32 images in 0..1 as `dtype`, uint8 rounded half to even."""
    if dtype == UINT8:
        levels = images * np.float32(255)
        np.rint(levels, out=levels)
        return np.clip(levels, 0, 255, out=levels).astype(np.uint8)
    return images if dtype == FLOAT32 else images.astype(dtype)


def _too_far_out(field: str, start: int, batch: Floats, images: Floats) -> InvalidInputError:
    row, _ = first(images, ~np.isfinite(images))
    largest = float(np.abs(batch[row]).max())
    return InvalidInputError(
        field,
        f"row {start + row} has a latent as large as {largest:.3g} and its image is not finite; latents are of order 1",
    )
