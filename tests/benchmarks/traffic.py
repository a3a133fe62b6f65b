"""What is sent: requests of any number of rows for a published model, and the answers that count as right."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format
from numpy.typing import NDArray

from children import BenchError
from vaeserve import tensors
from vaeserve.v1 import vae_pb2
from vaeserve_server.noise import standard_normal

SERVICE = "vaeserve.v1.VaeService"
SEED = 7
# A row's outputs depend a little on the batch it ran in; the card says how little. This is to tell right from wrong.
_TOLERANCE = 1e-3

Array = NDArray[Any]


@dataclass(frozen=True)
class Verb:
    """One of the three RPCs that run graphs: `graph` is what ONNX Runtime alone has to run for it."""

    name: str
    method: str
    graph: str
    request: Callable[[Model, int], Any]
    expected: Callable[[Model, int], Array]
    answered: Callable[[bytes], vae_pb2.Tensor]

    @property
    def path(self) -> str:
        """The RPC's HTTP/2 path."""
        return f"/{SERVICE}/{self.method}"


class Model:
    """One published model, and rows to send it: random ones, as good as any for the time that they take."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.card = json_format.Parse((folder / "model.json").read_text(), vae_pb2.ModelCard())
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def images(self, rows: int) -> Array:
        """Return images of pixels 0 and 255, uint8 `(rows, C, H, W)`."""
        bits = np.random.default_rng(SEED).integers(0, 2, (rows, *self.card.image_shape), dtype=np.uint8)
        return bits * np.uint8(255)

    def latents(self, rows: int) -> Array:
        """Return rows of the seed's noise, float32 `(rows, *latent_shape)`."""
        size = int(np.prod(self.card.latent_shape))
        return standard_normal(SEED, 0, rows, size).reshape(rows, *self.card.latent_shape)

    def run(self, graph: str, batch: Array) -> Array:
        """Return the graph's first output for `batch`, by ONNX Runtime and nothing else."""
        if graph not in self._sessions:
            self._sessions[graph] = onnxruntime.InferenceSession(
                self.folder / f"{graph}.onnx", providers=["CPUExecutionProvider"]
            )
        session = self._sessions[graph]
        output: Array = session.run(None, {session.get_inputs()[0].name: batch})[0]
        return output


def find_model(models: Path, name: str | None) -> Model:
    """Return the newest version of `name`, or of the only model in `models`; BenchError if there is none or several."""
    names = sorted({card.parents[1].name for card in models.glob("*/*/model.json")})
    if not names:
        raise BenchError(f"there is no model in {models}; `make run` trains and publishes one in about two minutes")
    if name is None and len(names) > 1:
        raise BenchError(f"{models} has several models; choose one with --model: {', '.join(names)}")
    chosen = name or names[0]
    if chosen not in names:
        raise BenchError(f"{models} has no model {chosen}; it has {', '.join(names)}")
    return Model(max((models / chosen).glob("*/model.json"), key=lambda card: int(card.parent.name)).parent)


def framed(message: bytes) -> bytes:
    """Return a message as gRPC sends it: not compressed, after its length."""
    return struct.pack(">BI", 0, len(message)) + message


def check(verb: Verb, model: Model, rows: int, answer: bytes) -> None:
    """Raise BenchError if `answer` is not what the graphs say."""
    given = tensors.from_tensor(verb.answered(answer))
    expected = verb.expected(model, rows)
    if given.shape != expected.shape or not np.allclose(given, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise BenchError(f"{verb.method} of {rows} rows was answered wrongly")


VERBS = [
    Verb(
        "encode",
        "Encode",
        "encoder",
        lambda model, rows: vae_pb2.EncodeRequest(images=tensors.to_tensor(model.images(rows))),
        lambda model, rows: model.run("encoder", model.images(rows).astype(np.float32) / np.float32(255)),
        lambda answer: vae_pb2.EncodeResponse.FromString(answer).mean,
    ),
    Verb(
        "decode",
        "Decode",
        "decoder",
        lambda model, rows: vae_pb2.DecodeRequest(latents=tensors.to_tensor(model.latents(rows))),
        lambda model, rows: model.run("decoder", model.latents(rows)),
        lambda answer: vae_pb2.DecodeResponse.FromString(answer).images,
    ),
    Verb(
        "sample",
        "Sample",
        "decoder",
        lambda model, rows: vae_pb2.SampleRequest(count=rows, seed=SEED, want_latents=True),
        lambda model, rows: model.run("decoder", model.latents(rows)),
        lambda answer: vae_pb2.SampleResponse.FromString(answer).images,
    ),
]
