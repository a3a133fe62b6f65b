"""The blocking client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from vaeserve import _calls, _settings
from vaeserve._blocking import BlockingTransport
from vaeserve._calls import Job
from vaeserve._inputs import ImageInput, LatentInput, as_images, as_latents
from vaeserve._progress import Progress
from vaeserve._results import Array, Encoding, ModelInfo, ModelLike, Samples


class Client(BlockingTransport):
    """A blocking client of one vaeserve server; safe to use from several threads.

        with Client("127.0.0.1:50051") as client:
            codes = client.encode(images)           # codes.mean, codes.stddev: (N, 20)
            copies = client.decode(codes)           # (N, 1, 28, 28), float32 in 0..1
            fresh = client.sample(64, seed=7).images

    Every verb raises the exceptions of `vaeserve.errors`, and takes `model` and `timeout_s` (the deadline of each
    call) where the client's own are not meant. Arrays of any length are cut into calls of a few hundred rows, several
    in flight; `progress` is True for a bar on the terminal, or a callable of (rows done, rows in all or None).
    """

    def encode(
        self,
        images: ImageInput,
        *,
        want_latents: bool = False,
        seed: int | None = None,
        first_row: int = 0,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> Encoding:
        """Return the approximate posterior q(z|x) of each image.

        Args:
            images: `(N, C, H, W)` uint8 0..255 or float 0..1, or what can only mean that: `(N, H, W)` for a grey
                model, channels last, one image, PIL images, a list of these, or an iterator of them, whose images
                are never all in memory.
            want_latents: also draw one latent for each image.
            seed: of that noise, in [0, 2**64); None draws one. The answer names it, and it gives the same noise again.
            first_row: row of the seed's stream that the first image uses.
            model, timeout_s, progress: see Client.
        """
        operation = _calls.encode_operation(want_latents=want_latents, seed=seed, first_row=first_row)
        return self._drive(self._map(Job(operation, self._ref(model), progress), as_images, images), timeout_s)

    def decode(
        self,
        latents: LatentInput,
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> Array:
        """Return the mean of p(x|z) for each latent: images `(N, C, H, W)`.

        Args:
            latents: `(N, *latent_shape)`, one latent, an Encoding (its means, and only by the model they came from),
                a list of these, or an iterator of them.
            dtype: of the images: float32 or float16 in 0..1, or uint8, rounded to 0..255.
            model, timeout_s, progress: see Client.
        """
        operation = _calls.decode_operation(dtype)
        return self._drive(self._decode(Job(operation, self._ref(model, latents), progress), latents), timeout_s)

    def sample(
        self,
        count: SupportsIndex,
        *,
        seed: int | None = None,
        first_row: int = 0,
        temperature: float | None = None,
        prior: str = "standard_normal",
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> Samples:
        """Return `count` fresh images: latents drawn from the prior, and decoded.

        Args:
            count: how many, at least 1.
            seed: in [0, 2**64); None draws one. The answer names it. `sample(10, seed=7)[:4]` is `sample(4, seed=7)`.
            first_row: row of the seed's stream that the first image uses.
            temperature: factor >= 0 on the prior's standard deviation; None is 1.
            prior: "standard_normal", or "fitted" where the model was published with one.
            dtype: of the images, as in `decode`.
            model, timeout_s, progress: see Client.
        """
        operation = _calls.sample_operation(
            seed=seed, first_row=first_row, temperature=temperature, prior=prior, dtype=dtype
        )
        return self._drive(self._sample(Job(operation, self._ref(model), progress), count), timeout_s)

    def reconstruct(
        self,
        images: ImageInput,
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> Array:
        """Return each image encoded to its posterior mean and decoded again: `(N, C, H, W)`; see encode and decode."""
        return self._drive(self._reconstruct(images, dtype, self._ref(model), progress), timeout_s)

    def interpolate(
        self,
        a: ImageInput | LatentInput,
        b: ImageInput | LatentInput,
        steps: SupportsIndex,
        spherical: bool = False,
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
    ) -> Array:
        """Return the images along a way through latent space, `(steps, C, H, W)`, both ends included.

        Args:
            a, b: each one image (encoded to its posterior mean), one latent, or an Encoding of one row.
            steps: how many images, at least 2.
            spherical: follow the great arc instead of the straight line.
            dtype: of the images, as in `decode`.
            model, timeout_s: see Client.
        """
        return self._drive(self._interpolate((a, b), steps, spherical=spherical, dtype=dtype, model=model), timeout_s)

    def traverse(
        self,
        latent: LatentInput,
        dim: int | Sequence[int],
        values: npt.ArrayLike,
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
    ) -> Array:
        """Return what one latent's element `dim` does: an image for each of `values`, `(len(values), C, H, W)`.

        Args:
            latent: one latent, or an Encoding of one row.
            dim: index into latent_shape: an integer, or one for each axis.
            values: what to set the element to, one after the other.
            dtype: of the images, as in `decode`.
            model, timeout_s: see Client.
        """
        return self._drive(self._traverse(latent, dim, values, dtype=dtype, model=model), timeout_s)

    def encode_stream(
        self,
        images: Iterable[ImageInput],
        *,
        want_latents: bool = False,
        seed: int | None = None,
        first_row: int = 0,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> Iterator[Encoding]:
        """Yield Encodings of a few hundred rows each, in order; see encode.

        `images` yields single images or arrays of any length, and is read only as fast as the answers are taken:
        whatever its length, `calls_in_flight` calls are in memory.
        """
        operation = _calls.encode_operation(want_latents=want_latents, seed=seed, first_row=first_row)
        return self._stream(Job(operation, self._ref(model), progress), as_images, images, self._deadline_s(timeout_s))

    def decode_stream(
        self,
        latents: Iterable[LatentInput],
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> Iterator[Array]:
        """Yield images of a few hundred latents each, in order; takes what encode_stream yields."""
        operation = _calls.decode_operation(dtype)
        job = Job(operation, self._ref(model), progress)
        return (value.images for value in self._stream(job, as_latents, latents, self._deadline_s(timeout_s)))

    def model(self, model: ModelLike = None, *, timeout_s: float | None = None) -> ModelInfo:
        """Return what a served model is and how it is served."""
        return self._drive(self._get_model(self._ref(model)), timeout_s)

    def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Return every served model, by name, newest version first."""
        return self._drive(self._list_models(), timeout_s)

    def healthy(self, *, timeout_s: float | None = None) -> bool:
        """Return whether a server is there and says by the standard health service that it is serving."""
        return self._check_health(self._deadline_s(timeout_s))

    def wait_ready(self, timeout_s: float = _settings.DEFAULT_TIMEOUT_S) -> None:
        """Return as soon as the server says that it is serving; DeadlineExceeded after `timeout_s`."""
        self._wait_ready(_settings.check_timeout(timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
