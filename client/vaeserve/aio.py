"""The asyncio client: the blocking client's verbs, awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

from vaeserve import _calls, _settings
from vaeserve._asyncio import AsyncioTransport
from vaeserve._calls import Job
from vaeserve._coalesce import Coalescer
from vaeserve._inputs import ImageInput, LatentInput, as_images, as_latents
from vaeserve._progress import Progress
from vaeserve._results import Array, Encoding, ModelInfo, ModelLike, Samples


class AsyncClient(AsyncioTransport):
    """An asyncio client of one vaeserve server, for any number of tasks of one event loop.

        async with AsyncClient("127.0.0.1:50051") as client:
            codes = await client.encode(images)

    Its verbs, their arguments and their errors are Client's; cancelling a task cancels its calls. Where Client takes an
    iterator of rows, this one takes an asynchronous one too.
    """

    def __init__(
        self,
        target: str = _settings.DEFAULT_TARGET,
        *,
        coalesce: bool = False,
        model: ModelLike = None,
        timeout_s: float = _settings.DEFAULT_TIMEOUT_S,
        rows_per_call: int | None = None,
        calls_in_flight: int = _calls.DEFAULT_CALLS_IN_FLIGHT,
        max_attempts: int = _settings.MAX_ATTEMPTS,
        tls: _settings.TLS | bool = False,
        token: str | Path | None = None,
        insecure: bool = False,
        metadata: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]] = (),
        connections: int = 1,
        max_message_bytes: int = _settings.MAX_MESSAGE_BYTES,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Set up a client; it connects when it is first used.

        Args:
            target: "host:port", or any gRPC target, of several servers too.
            coalesce: send small calls that tasks make at the same time as one, up to `rows_per_call` rows. Each task
                has its own answer, error and deadline; many tasks with a row or a few each get several times as much
                done. Only what draws no noise goes together: encode without latents, and decode.

        The others are Client's.
        """
        super().__init__(
            target,
            model=model,
            timeout_s=timeout_s,
            rows_per_call=rows_per_call,
            calls_in_flight=calls_in_flight,
            max_attempts=max_attempts,
            tls=tls,
            token=token,
            insecure=insecure,
            metadata=metadata,
            connections=connections,
            max_message_bytes=max_message_bytes,
            channel_options=channel_options,
        )
        if coalesce:
            self._coalescer = Coalescer(self._send_part, target)

    async def encode(
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
        """Return the approximate posterior q(z|x) of each image; see Client.encode."""
        operation = _calls.encode_operation(want_latents=want_latents, seed=seed, first_row=first_row)
        return await self._drive(self._map(Job(operation, self._ref(model), progress), as_images, images), timeout_s)

    async def decode(
        self,
        latents: LatentInput,
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> Array:
        """Return the mean of p(x|z) for each latent: images `(N, C, H, W)`; see Client.decode."""
        operation = _calls.decode_operation(dtype)
        return await self._drive(self._decode(Job(operation, self._ref(model, latents), progress), latents), timeout_s)

    async def sample(
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
        """Return `count` fresh images: latents drawn from the prior, and decoded; see Client.sample."""
        operation = _calls.sample_operation(
            seed=seed, first_row=first_row, temperature=temperature, prior=prior, dtype=dtype
        )
        return await self._drive(self._sample(Job(operation, self._ref(model), progress), count), timeout_s)

    async def reconstruct(
        self,
        images: ImageInput,
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> Array:
        """Return each image encoded to its posterior mean and decoded again; see Client.reconstruct."""
        return await self._drive(self._reconstruct(images, dtype, self._ref(model), progress), timeout_s)

    async def interpolate(
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
        """Return the images along a way through latent space, `(steps, C, H, W)`; see Client.interpolate."""
        return await self._drive(
            self._interpolate((a, b), steps, spherical=spherical, dtype=dtype, model=model), timeout_s
        )

    async def traverse(
        self,
        latent: LatentInput,
        dim: int | Sequence[int],
        values: npt.ArrayLike,
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
    ) -> Array:
        """Return what one latent's element `dim` does, an image for each of `values`; see Client.traverse."""
        return await self._drive(self._traverse(latent, dim, values, dtype=dtype, model=model), timeout_s)

    async def encode_stream(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        want_latents: bool = False,
        seed: int | None = None,
        first_row: int = 0,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> AsyncGenerator[Encoding, None]:
        """Yield Encodings of a few hundred rows each, in order; see Client.encode_stream."""
        operation = _calls.encode_operation(want_latents=want_latents, seed=seed, first_row=first_row)
        job = Job(operation, self._ref(model), progress)
        async with aclosing(self._stream(job, as_images, images, self._deadline_s(timeout_s))) as values:
            async for value in values:
                yield value

    async def decode_stream(
        self,
        latents: Iterable[LatentInput] | AsyncIterable[LatentInput],
        *,
        dtype: npt.DTypeLike = np.float32,
        model: ModelLike = None,
        timeout_s: float | None = None,
        progress: Progress = False,
    ) -> AsyncGenerator[Array, None]:
        """Yield images of a few hundred latents each, in order; see Client.decode_stream."""
        job = Job(_calls.decode_operation(dtype), self._ref(model), progress)
        async with aclosing(self._stream(job, as_latents, latents, self._deadline_s(timeout_s))) as values:
            async for value in values:
                yield value.images

    async def model(self, model: ModelLike = None, *, timeout_s: float | None = None) -> ModelInfo:
        """Return what a served model is and how it is served."""
        return await self._drive(self._get_model(self._ref(model)), timeout_s)

    async def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Return every served model, by name, newest version first."""
        return await self._drive(self._list_models(), timeout_s)

    async def healthy(self, *, timeout_s: float | None = None) -> bool:
        """Return whether a server is there and says by the standard health service that it is serving."""
        return await self._check_health(self._deadline_s(timeout_s))

    async def wait_ready(self, timeout_s: float = _settings.DEFAULT_TIMEOUT_S) -> None:
        """Return as soon as the server says that it is serving; DeadlineExceeded after `timeout_s`."""
        await self._wait_ready(_settings.check_timeout(timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
