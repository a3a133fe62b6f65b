"""The small frozen values that the SDK's verbs take and return."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vaeserve import tensors
from vaeserve.errors import invalid
from vaeserve.v1 import vae_pb2

Float32 = NDArray[np.float32]
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model: name, version and digest, each of which may be empty.

    In a request an empty name means the only model served and an empty version the highest one; a digest that is not
    the served model's is refused with FailedPrecondition. In an answer all three are set.
    """

    name: str = ""
    version: str = ""
    digest: str = ""

    def __str__(self) -> str:
        name = self.name or "(the served model)"
        return f"{name}/{self.version}" if self.version else name

    @classmethod
    def of(cls, given: ModelLike) -> ModelRef:
        """Return `given` as a ModelRef: one already, None (any), "mnist" or "mnist/1"."""
        if isinstance(given, ModelRef):
            return given
        if given is None:
            return cls()
        if not isinstance(given, str):
            raise invalid("model", f'model is {given!r}; give "name", "name/version" or a ModelRef')
        name, _, version = given.partition("/")
        return cls(name, version)

    @classmethod
    def from_message(cls, message: vae_pb2.ModelRef) -> ModelRef:
        """Return the value of a ModelRef message."""
        return cls(message.name, message.version, message.digest)

    def message(self) -> vae_pb2.ModelRef:
        """Return this as a ModelRef message."""
        message = vae_pb2.ModelRef()
        self.write(message)
        return message

    def write(self, message: vae_pb2.ModelRef) -> None:
        """Write this into an empty ModelRef message; one in a request stays unset if there is nothing to say."""
        if self.name:
            message.name = self.name
        if self.version:
            message.version = self.version
        if self.digest:
            message.digest = self.digest


ModelLike = ModelRef | str | None


class Answer(Protocol):
    """What every answer has."""

    @property
    def model(self) -> ModelRef:
        """The model that answered."""


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Encoding:
    """The approximate posterior q(z|x) of each image, a diagonal Gaussian, and perhaps one draw from it.

    `codes[2]`, `codes[10:20]` and `codes[mask]` are Encodings of those rows. An Encoding remembers its model, so that
    `client.decode(codes)` never meets another model's decoder.

    Attributes:
        model: the model that answered.
        mean: float32 `(N, *latent_shape)`.
        stddev: standard deviation, float32 `(N, *latent_shape)`, > 0.
        latents: `mean + stddev * noise`, float32 `(N, *latent_shape)`; None unless `want_latents` was set.
        seed: the seed of that noise; None unless `want_latents` was set.
    """

    mean: Float32
    stddev: Float32
    latents: Float32 | None = None
    seed: int | None = None
    model: ModelRef

    def __len__(self) -> int:
        return len(self.mean)

    def __repr__(self) -> str:
        return _describe(self, mean=self.mean, stddev=self.stddev, latents=self.latents)

    def __getitem__(self, index: int | slice | Array | Sequence[int]) -> Encoding:
        if isinstance(index, (int, np.integer)):
            row = operator.index(index) + (len(self) if index < 0 else 0)
            if not 0 <= row < len(self):
                raise IndexError(f"row {index} of an Encoding with {len(self)} rows")
            index = slice(row, row + 1)
        return Encoding(
            mean=self.mean[index],
            stddev=self.stddev[index],
            latents=None if self.latents is None else self.latents[index],
            seed=self.seed,
            model=self.model,
        )

    @classmethod
    def from_response(cls, response: vae_pb2.EncodeResponse) -> Encoding:
        """Return the answer's value; its arrays are read-only views of the message until joined."""
        drawn = response.HasField("latents")
        return cls(
            model=ModelRef.from_message(response.model),
            mean=tensors.from_tensor(response.mean),  # type: ignore[arg-type]
            stddev=tensors.from_tensor(response.stddev),  # type: ignore[arg-type]
            latents=tensors.from_tensor(response.latents) if drawn else None,  # type: ignore[arg-type]
            seed=response.seed if drawn else None,
        )

    @classmethod
    def join(cls, parts: Sequence[Encoding]) -> Encoding:
        """Return the rows of all parts (at least one) in order, in arrays of their own."""
        first = parts[0]
        return cls(
            model=first.model,
            mean=_own([part.mean for part in parts]),
            stddev=_own([part.stddev for part in parts]),
            latents=None if first.latents is None else _own([part.latents for part in parts]),
            seed=first.seed,
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Samples:
    """Images drawn from the model.

    Attributes:
        model: the model that answered.
        images: `(N, C, H, W)`, float32 or float16 in 0..1, or uint8 in 0..255, as asked for.
        latents: the latents they were decoded from, float32 `(N, *latent_shape)`.
        seed: the same seed gives the same latents again.
    """

    images: Array
    latents: Float32
    seed: int
    model: ModelRef

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return _describe(self, images=self.images, latents=self.latents)

    @classmethod
    def from_response(cls, response: vae_pb2.SampleResponse) -> Samples:
        """Return the answer's value; its arrays are read-only views of the message until joined."""
        return cls(
            model=ModelRef.from_message(response.model),
            images=tensors.from_tensor(response.images),
            latents=tensors.from_tensor(response.latents),  # type: ignore[arg-type]
            seed=response.seed,
        )

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Return the rows of all parts (at least one) in order, in arrays of their own."""
        return cls(
            model=parts[0].model,
            images=_own([part.images for part in parts]),
            latents=_own([part.latents for part in parts]),
            seed=parts[0].seed,
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Decoded:
    """Images of one Decode call; the verbs hand out its `images` alone."""

    images: Array
    model: ModelRef

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return _describe(self, images=self.images)

    def __getitem__(self, rows: slice) -> Decoded:
        return replace(self, images=self.images[rows])

    @classmethod
    def from_response(cls, response: vae_pb2.DecodeResponse) -> Decoded:
        """Return the answer's value; its array is a read-only view of the message until joined."""
        return cls(model=ModelRef.from_message(response.model), images=tensors.from_tensor(response.images))

    @classmethod
    def join(cls, parts: Sequence[Decoded]) -> Decoded:
        """Return the rows of all parts (at least one) in order, in an array of their own."""
        return cls(model=parts[0].model, images=_own([part.images for part in parts]))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model: what it is and how it is being served. `print` shows it in a few lines.

    Attributes:
        ref: its name, version and digest.
        image_shape: `(C, H, W)`.
        latent_shape: `(D,)` or `(C, h, w)`.
        encoder_input: what the encoder was trained to see, so what to send: "binarised" (pixels 0 or 1) or "grey".
        provider: the execution provider that really runs it, in ONNX Runtime's words.
        max_rows_per_call: most rows one call may carry; the SDK cuts larger arrays by itself.
        card: the whole ModelCard message: likelihood, data set, held-out figures, parity, versions.
        serving: the whole Serving message.
    """

    ref: ModelRef
    image_shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    encoder_input: str
    provider: str
    max_rows_per_call: int
    card: vae_pb2.ModelCard = field(repr=False)  # hundreds of lines
    serving: vae_pb2.Serving = field(repr=False)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    @property
    def name(self) -> str:
        """The model's name."""
        return self.ref.name

    @property
    def version(self) -> str:
        """The model's version."""
        return self.ref.version

    @property
    def digest(self) -> str:
        """The model's digest (bundle id)."""
        return self.ref.digest

    @classmethod
    def from_message(cls, message: vae_pb2.GetModelResponse) -> ModelInfo:
        """Return the value of a GetModel answer."""
        card, serving = message.card, message.serving
        encoder_input = vae_pb2.EncoderInput.Name(card.encoder_input)
        return cls(
            ref=ModelRef(card.name, card.version, card.digest),
            image_shape=tuple(card.image_shape),
            latent_shape=tuple(card.latent_shape),
            encoder_input=encoder_input.removeprefix("ENCODER_INPUT_").lower(),
            provider=serving.provider,
            max_rows_per_call=serving.max_rows_per_call,
            card=card,
            serving=serving,
        )

    def _lines(self) -> Iterator[str]:
        card, serving = self.card, self.serving
        rows = {
            "images": " x ".join(map(str, self.image_shape)),
            "latents": " x ".join(map(str, self.latent_shape)),
            "encoder input": self.encoder_input,
            "likelihood": vae_pb2.Likelihood.Name(card.likelihood).removeprefix("LIKELIHOOD_").lower(),
            "data": f"{card.dataset.name or 'unknown'}, {card.dataset.train_images} training images",
            "provider": f"{self.provider} (asked for: {serving.requested_device})"
            + (", fell back to the CPU" if serving.fell_back_to_cpu else "")
            + (", in float16" if serving.precision == vae_pb2.DATA_TYPE_FLOAT16 else ""),
            "rows per call": f"at most {self.max_rows_per_call}",
            "digest": self.digest,
        }
        yield str(self.ref)
        yield from (f"  {name:<14} {value}" for name, value in rows.items())
        for evaluation in card.evaluations:
            if evaluation.HasField("neg_elbo_nats"):
                yield f"  {'-ELBO':<14} {evaluation.neg_elbo_nats:.2f} nats ({evaluation.protocol})"


def _own(parts: Sequence[Array | None]) -> Array:
    """Return the parts end to end in one new, writable array of this machine's byte order."""
    first: Array = parts[0]  # type: ignore[assignment]
    joined: Array = first.copy() if len(parts) == 1 else np.concatenate(parts)  # type: ignore[arg-type]
    return joined if joined.dtype.isnative else joined.astype(joined.dtype.newbyteorder("="))


def _describe(value: Encoding | Samples | Decoded, **arrays: Array | None) -> str:
    given = ((name, array) for name, array in arrays.items() if array is not None)
    shapes = ", ".join(f"{name}={array.dtype}{list(array.shape)}" for name, array in given)
    return f"{type(value).__name__}({shapes}, model={str(value.model)!r})"
