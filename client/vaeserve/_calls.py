"""What both clients share: how a verb becomes calls, and their answers one result. No grpc here, and no waiting.

A verb is an Operation (how to write a request and read its answer) over Parts (the rows of each call). `client.py` and
`aio.py` only move messages.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, SupportsIndex, TypeVar

import numpy as np
import numpy.typing as npt

from vaeserve import tensors
from vaeserve._progress import Progress
from vaeserve._results import Answer, Array, Decoded, Encoding, ModelInfo, ModelRef, Samples
from vaeserve.errors import FailedPrecondition, invalid
from vaeserve.v1 import vae_pb2

DEFAULT_CALLS_IN_FLIGHT = 4
# Rows are the lever for throughput, up to a few hundred or a megabyte; more only makes retries dearer, queues coarser.
_DEFAULT_ROWS = 512
_DEFAULT_CALL_BYTES = 2**20
_ENVELOPE_BYTES = 4096  # everything in a message but its tensors' data, with room to spare

_IMAGE_DTYPES = {
    np.dtype(np.float32): tensors.FLOAT32,
    np.dtype(np.float16): tensors.FLOAT16,
    np.dtype(np.uint8): tensors.UINT8,
}
_PRIORS = {"standard_normal": vae_pb2.PRIOR_STANDARD_NORMAL, "fitted": vae_pb2.PRIOR_FITTED}

_Value = TypeVar("_Value", bound=Answer)


class Part(NamedTuple):
    """The rows of one call: `rows` of them from row `start` of the whole; the rows themselves, unless none are sent."""

    start: int
    rows: int
    array: Array | None = None


class Operation(Protocol, Generic[_Value]):
    """How one verb writes its request and reads its answer."""

    method: str

    @property
    def merges(self) -> bool:
        """Whether rows of several calls may go in one: no row's answer depends on its place in the call."""

    def request(self, part: Part, model: ModelRef) -> Any:
        """Return the request message for one part."""

    def result(self, response: Any) -> _Value:
        """Return the answer's value, in views of the message."""

    def join(self, values: Sequence[_Value]) -> _Value:
        """Return the values (at least one) end to end, in arrays of their own."""

    def row_bytes(self, info: ModelInfo, array: Array | None) -> int:
        """Return the size of one row in the larger of request and answer."""


@dataclass(frozen=True, slots=True)
class Encode:
    """Encode images, perhaps with one draw each."""

    seed: int | None = None
    first_row: int = 0
    method = "Encode"

    @property
    def merges(self) -> bool:
        """Without noise."""
        return self.seed is None

    def request(self, part: Part, model: ModelRef) -> vae_pb2.EncodeRequest:
        """Return the request for the images of `part`."""
        assert part.array is not None
        request = vae_pb2.EncodeRequest()
        model.write(request.model)
        tensors.write_tensor(part.array, request.images)
        if self.seed is not None:
            request.want_latents = True
            request.seed = self.seed
            request.first_row = _uint64("first_row", self.first_row + part.start)
        return request

    result = staticmethod(Encoding.from_response)
    join = staticmethod(Encoding.join)

    def row_bytes(self, info: ModelInfo, array: Array | None) -> int:
        """Return the size of one row: an image, or its mean, stddev and latent."""
        assert array is not None
        return max(_row_bytes(array), 3 * 4 * math.prod(info.latent_shape))


_ENCODE = Encode()


@dataclass(frozen=True, slots=True)
class Decode:
    """Decode latents to images of a chosen type."""

    image_dtype: np.dtype[Any]
    method = "Decode"
    merges = True

    def request(self, part: Part, model: ModelRef) -> vae_pb2.DecodeRequest:
        """Return the request for the latents of `part`."""
        assert part.array is not None
        request = vae_pb2.DecodeRequest(image_dtype=_IMAGE_DTYPES[self.image_dtype])
        model.write(request.model)
        tensors.write_tensor(part.array, request.latents)
        return request

    result = staticmethod(Decoded.from_response)
    join = staticmethod(Decoded.join)

    def row_bytes(self, info: ModelInfo, array: Array | None) -> int:
        """Return the size of one row: a latent or an image."""
        assert array is not None
        return max(_row_bytes(array), self.image_dtype.itemsize * math.prod(info.image_shape))


@dataclass(frozen=True, slots=True)
class Sample:
    """Draw images from a prior."""

    seed: int
    first_row: int
    temperature: float | None
    prior: vae_pb2.Prior
    image_dtype: np.dtype[Any]
    method = "Sample"
    merges = False  # rows are those of one seed's stream

    def request(self, part: Part, model: ModelRef) -> vae_pb2.SampleRequest:
        """Return the request for as many images as `part` has rows."""
        request = vae_pb2.SampleRequest(
            count=part.rows,
            seed=self.seed,
            first_row=_uint64("first_row", self.first_row + part.start),
            temperature=self.temperature,
            prior=self.prior,
            want_latents=True,
            image_dtype=_IMAGE_DTYPES[self.image_dtype],
        )
        model.write(request.model)
        return request

    result = staticmethod(Samples.from_response)
    join = staticmethod(Samples.join)

    def row_bytes(self, info: ModelInfo, array: Array | None) -> int:
        """Return the size of one row of the answer: an image and its latent."""
        return self.image_dtype.itemsize * math.prod(info.image_shape) + 4 * math.prod(info.latent_shape)


class Job(Generic[_Value]):
    """One bulk verb under way: its operation, and the one model that all of its answers come from.

    That is the model asked for until the first answer, then the one that gave it: later calls name its digest, and an
    answer already under way from another model is asked for again. So a reload never mixes models in one result.
    """

    def __init__(self, operation: Operation[_Value], asked: ModelRef, progress: Progress = False) -> None:
        self.operation = operation
        self.asked = asked
        self.progress = progress
        self.total_rows: int | None = None
        self._pinned: ModelRef | None = None

    @property
    def ref(self) -> ModelRef:
        """The model known so far."""
        return self._pinned or self.asked

    def request(self, part: Part) -> Any:
        """Return the request message for one part, to the model known so far."""
        return self.operation.request(part, self.ref)

    def accept(self, served: ModelRef) -> bool:
        """Tell whether an answer of this model belongs to the job; the first answer decides which one does."""
        if self._pinned is None:
            self._pinned = served
        return served.digest == self._pinned.digest

    def insist(self, served: ModelRef) -> None:
        """Raise FailedPrecondition if a server that was told the digest answers with another model."""
        if not self.accept(served):
            words = f"answers came from {self.ref} ({self.ref.digest[:12]}) and then, although that was "
            raise FailedPrecondition(words + f"asked for, from {served} ({served.digest[:12]})", model=str(served))

    def narrow(self, given: object) -> None:
        """Take the model of the Encodings in `given`, if there are any; FailedPrecondition if it is another one."""
        narrowed = bind(self.ref, given)
        if self._pinned is None:
            self.asked = narrowed


class Cutter:
    """Cuts what an iterator yields, single rows or arrays of any length, into Parts of equal length.

    Holds less than the rows of one part besides the array it is cutting. A part has rows of one dtype only.
    """

    def __init__(self) -> None:
        self._held: list[Array] = []
        self._held_rows = 0
        self._start = 0

    def push(self, array: Array, rows_per_call: int) -> Iterator[Part]:
        """Take some rows; yield the parts that are now full."""
        if self._held and array.dtype != self._held[0].dtype:
            yield from self.flush()
        while len(array):
            taken = array[: max(1, rows_per_call - self._held_rows)]
            array = array[len(taken) :]
            self._held.append(taken)
            self._held_rows += len(taken)
            if self._held_rows >= rows_per_call:
                yield from self.flush()

    def flush(self) -> Iterator[Part]:
        """Yield what is held, if anything."""
        if self._held_rows:
            array = self._held[0] if len(self._held) == 1 else np.concatenate(self._held)
            part = Part(self._start, self._held_rows, array)
            self._start += self._held_rows
            self._held, self._held_rows = [], 0
            yield part


def bind(ref: ModelRef, given: object) -> ModelRef:
    """Return `ref` narrowed to the model of the Encodings in `given`; unchanged if there are none.

    The server refuses if it no longer serves that model. Raises FailedPrecondition for Encodings of two models.
    """
    for each in given if isinstance(given, (list, tuple)) else (given,):
        if not isinstance(each, Encoding):
            continue
        owner = each.model
        if ref.digest and ref.digest != owner.digest:
            words = f"latents of {owner} ({owner.digest[:12]}) do not go with model {ref} ({ref.digest[:12]})"
            raise FailedPrecondition(words, model=str(ref))
        if ref.name in ("", owner.name) and ref.version in ("", owner.version):
            ref = owner
        else:
            ref = replace(ref, digest=owner.digest)
    return ref


def even_parts(rows: int, rows_per_call: int, array: Array | None = None) -> Iterator[Part]:
    """Yield the fewest Parts of at most `rows_per_call` rows, as equal as can be; `array` holds the rows, if any do."""
    calls = -(-rows // rows_per_call)
    for call in range(calls):
        start, stop = rows * call // calls, rows * (call + 1) // calls
        yield Part(start, stop - start, None if array is None else array[start:stop])


def rows_per_call(
    operation: Operation[Any], info: ModelInfo, array: Array | None, *, wanted: int | None, max_message_bytes: int
) -> int:
    """Return how many rows to put in one call: what the user wants or a few hundred, within both sides' limits."""
    row_bytes = max(1, operation.row_bytes(info, array))
    rows = wanted or min(_DEFAULT_ROWS, _DEFAULT_CALL_BYTES // row_bytes)
    rows = min(rows, (max_message_bytes - _ENVELOPE_BYTES) // row_bytes)
    if info.max_rows_per_call > 0:
        rows = min(rows, info.max_rows_per_call)
    return max(1, rows)


def _row_bytes(array: Array) -> int:
    return array.dtype.itemsize * math.prod(array.shape[1:])


def encode_operation(*, want_latents: bool, seed: int | None, first_row: int) -> Encode:
    """Return the checked Encode operation; the seed is drawn here, before the first attempt."""
    if not want_latents:
        if seed is not None or first_row:
            raise invalid("want_latents", "a seed or first_row is given but no latents are asked for; set want_latents")
        return _ENCODE
    return Encode(draw_seed(seed), _uint64("first_row", first_row))


def decode_operation(dtype: npt.DTypeLike) -> Decode:
    """Return the checked Decode operation."""
    return Decode(_image_dtype(dtype))


def sample_operation(
    *, seed: int | None, first_row: int, temperature: float | None, prior: str, dtype: npt.DTypeLike
) -> Sample:
    """Return the checked Sample operation; the seed is drawn here, before the first attempt."""
    if prior not in _PRIORS:
        raise invalid("prior", f"prior is {prior!r}; give one of {', '.join(map(repr, _PRIORS))}")
    row = _uint64("first_row", first_row)
    return Sample(draw_seed(seed), row, temperature, _PRIORS[prior], _image_dtype(dtype))


def draw_seed(seed: int | None) -> int:
    """Return the seed given, checked, or a fresh one below 2**53 (so that every language's numbers keep it)."""
    return secrets.randbits(53) if seed is None else _uint64("seed", seed)


def _uint64(name: str, value: SupportsIndex) -> int:
    number = operator.index(value)
    if not 0 <= number < 2**64:
        raise invalid(name, f"{name} is {number}; it must be in [0, 2**64)")
    return number


def _image_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    try:
        found: np.dtype[Any] | None = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in _IMAGE_DTYPES:
        raise invalid("image_dtype", f"dtype is {dtype!r}; images come as float32, float16 or uint8")
    return found
