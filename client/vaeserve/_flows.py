"""The verbs, written once for both clients.

A verb is a generator (a Flow) that yields what it wants done, an Ask, and is sent the answer; the blocking and the
asyncio client drive the same flows and differ only in how they wait.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, NamedTuple, SupportsIndex, TypeVar

import numpy.typing as npt

from vaeserve import _calls, _paths
from vaeserve._base import ClientBase
from vaeserve._calls import Job, Part
from vaeserve._inputs import as_images, as_latents, is_stream
from vaeserve._progress import Progress
from vaeserve._results import Answer, Array, Decoded, ModelInfo, ModelLike, ModelRef, Samples
from vaeserve.errors import InvalidArgument
from vaeserve.v1 import vae_pb2

_Value = TypeVar("_Value", bound=Answer)
_Fitted = TypeVar("_Fitted")

Fit = Callable[[Any, ModelInfo], Array]


class Ask(NamedTuple):
    """Make one call; the answer is the response message."""

    method: str
    request: Any


class AskPart(NamedTuple, Generic[_Value]):
    """Make the one call of a part, to the model of `info`; the answer is its value, in views of a message."""

    job: Job[_Value]
    part: Part
    info: ModelInfo


class AskAll(NamedTuple, Generic[_Value]):
    """Make the calls of all parts, several in flight; the answer is the list of their values in order."""

    job: Job[_Value]
    parts: Iterable[Part]


class AskStream(NamedTuple, Generic[_Value]):
    """Make calls of what an iterator yields; the answer is the list of their values in order."""

    job: Job[_Value]
    fit: Fit
    items: Any


_T = TypeVar("_T")
Wanted = Ask | AskPart[Any] | AskAll[Any] | AskStream[Any]
Flow = Generator[Wanted, Any, _T]


class Flows(ClientBase):
    """The verbs as flows."""

    def _decode(self, job: Job[Decoded], latents: Any) -> Flow[Array]:
        decoded = yield from self._map(job, as_latents, latents)
        return decoded.images

    def _sample(self, job: Job[Samples], count: SupportsIndex) -> Flow[Samples]:
        info = yield from self._card(job.asked)
        return (yield from self._run(job, info, operator.index(count), None))

    def _reconstruct(self, images: Any, dtype: npt.DTypeLike, ref: ModelRef, progress: Progress) -> Flow[Array]:
        decode = _calls.decode_operation(dtype)
        codes = yield from self._map(Job(_calls.Encode(), ref, progress), as_images, images)
        return (yield from self._decode(Job(decode, codes.model, progress), codes))

    def _interpolate(
        self, ends: tuple[Any, Any], steps: SupportsIndex, *, spherical: bool, dtype: npt.DTypeLike, model: ModelLike
    ) -> Flow[Array]:
        decode = _calls.decode_operation(dtype)
        ref = self._ref(model, ends)
        _, (a, b) = yield from self._fit(_paths.as_ends, ends, ref)
        images = [end.row for end in (a, b) if end.is_image]
        if images:
            codes = yield from self._map(Job(_calls.Encode(), ref), as_images, images)
            ref = codes.model
            a, b = _paths.place((a, b), codes)
        path = _paths.interpolation(a.row, b.row, steps, spherical=spherical)
        return (yield from self._decode(Job(decode, ref), path))

    def _traverse(
        self, latent: Any, dim: int | Sequence[int], values: npt.ArrayLike, *, dtype: npt.DTypeLike, model: ModelLike
    ) -> Flow[Array]:
        decode = _calls.decode_operation(dtype)
        ref = self._ref(model, latent)
        _, row = yield from self._fit(_paths.as_one_latent, latent, ref)
        return (yield from self._decode(Job(decode, ref), _paths.traversal(row, dim, values)))

    def _get_model(self, ref: ModelRef) -> Flow[ModelInfo]:
        answer = yield Ask("GetModel", vae_pb2.GetModelRequest(model=ref.message()))
        return self._remember(ref, ModelInfo.from_message(answer))

    def _list_models(self) -> Flow[list[ModelInfo]]:
        answer = yield Ask("ListModels", vae_pb2.ListModelsRequest())
        return [ModelInfo.from_message(each) for each in answer.models]

    def _card(self, ref: ModelRef) -> Flow[ModelInfo]:
        """Return the model's card, asked for once."""
        return self._cards.get(ref) or (yield from self._get_model(ref))

    def _fit(
        self, fit: Callable[[Any, ModelInfo], _Fitted], given: Any, ref: ModelRef
    ) -> Flow[tuple[ModelInfo, _Fitted]]:
        """Return the model's card and what `fit` makes of `given` by it."""
        if info := self._cards.get(ref):
            try:
                return info, fit(given, info)
            except InvalidArgument:
                self._cards.pop(ref, None)  # perhaps another model is served by now: judge by today's card
        info = yield from self._card(ref)
        return info, fit(given, info)

    def _map(self, job: Job[_Value], fit: Fit, given: Any) -> Flow[_Value]:
        """Run a job over the rows given."""
        if is_stream(given):
            values = yield AskStream(job, fit, given)
            if values:
                return job.operation.join(values)
            given = ()
        info, array = yield from self._fit(fit, given, job.asked)
        return (yield from self._run(job, info, len(array), array))

    def _run(self, job: Job[_Value], info: ModelInfo, rows: int, array: Array | None) -> Flow[_Value]:
        """Make the calls; one that is enough is made without any of the machinery of many."""
        # No rows go in one call as well, as the server has the words for that; and one row always goes into one.
        if rows < 1 or (not job.progress and (rows == 1 or rows <= self._rows(job.operation, info, array))):
            value = job.operation.join([(yield AskPart(job, Part(0, rows, array), info))])
        else:
            job.total_rows = rows
            parts = _calls.even_parts(rows, self._rows(job.operation, info, array), array)
            value = job.operation.join((yield AskAll(job, parts)))
        if value.model.digest != info.digest:
            self._cards.pop(job.asked, None)  # another model is served by now: its card is asked for next time
        return value
