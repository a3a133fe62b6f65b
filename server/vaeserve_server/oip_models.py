"""What the Open Inference Protocol calls a model: an encoder, a decoder or a sampler, three views of one engine.

A view says what goes in and out under which name, and asks the engine. It has no rules of its own for rows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vaeserve_server.checks import Array
from vaeserve_server.engine import Engine
from vaeserve_server.errors import InvalidInputError
from vaeserve_server.noise import draw_seed
from vaeserve_server.oip_parameters import Parameters
from vaeserve_server.oip_tensors import IMAGE_DTYPES, integer
from vaeserve_server.work import FLOAT32, Noise

ROWS = -1
"""Stands in a shape for any number of rows."""
DIGEST, TIMEOUT = "digest", "timeout"

_Arrays = Mapping[str, Array]
_FITTED_PRIOR = {"standard_normal": False, "fitted": True}
_UINT64_MAX = 2**64 - 1


class Port(NamedTuple):
    """One input or output. Images may be sent, and asked for, in other datatypes too."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class View:
    """One way to use an engine; the protocol's model is `<name>-<role>`. `batches` says whether inputs have rows."""

    role: str
    batches: bool
    parameters: tuple[str, ...]
    inputs: Callable[[Engine], list[Port]]
    outputs: Callable[[Engine], list[Port]]
    infer: Callable[[Engine, _Arrays, Parameters, float], Awaitable[dict[str, Array]]]


async def _encode(engine: Engine, inputs: _Arrays, parameters: Parameters, deadline: float) -> dict[str, Array]:
    mean, stddev = await engine.encode(inputs["image"], None, deadline)
    return {"mean": mean, "stddev": stddev}


async def _decode(engine: Engine, inputs: _Arrays, parameters: Parameters, deadline: float) -> dict[str, Array]:
    image_dtype = parameters.choice("image_datatype", IMAGE_DTYPES, FLOAT32)
    return {"image": await engine.decode(inputs["latent"], image_dtype, deadline)}


async def _sample(engine: Engine, inputs: _Arrays, parameters: Parameters, deadline: float) -> dict[str, Array]:
    draw = Noise(_seed(inputs), parameters.integer("first_row"))
    with np.errstate(over="ignore"):  # the engine refuses infinity
        temperature = float(np.float32(parameters.number("temperature", 1.0)))  # as the native contract has it
    images, latents = await engine.sample(
        integer("count", inputs["count"]),
        draw,
        parameters.choice("image_datatype", IMAGE_DTYPES, FLOAT32),
        temperature=temperature,
        fitted_prior=parameters.choice("prior", _FITTED_PRIOR, False),
        deadline=deadline,
    )
    return {"image": images, "latent": latents, "seed": np.array([draw.seed], np.uint64)}


def _seed(inputs: _Arrays) -> int:
    if "seed" not in inputs:
        return draw_seed()
    seed = integer("seed", inputs["seed"])
    if not 0 <= seed <= _UINT64_MAX:
        raise InvalidInputError("seed", f"seed is {seed}; it must be 0 to 2**64 - 1")
    return seed


def _image(engine: Engine) -> Port:
    return Port("image", "FP32", (ROWS, *engine.image_shape))


def _latents(engine: Engine, *names: str) -> list[Port]:
    return [Port(name, "FP32", (ROWS, *engine.latent_shape)) for name in names]


_ALL = (DIGEST, TIMEOUT)
VIEWS = [
    View(
        "encoder",
        batches=True,
        parameters=_ALL,
        inputs=lambda engine: [_image(engine)],
        outputs=lambda engine: _latents(engine, "mean", "stddev"),
        infer=_encode,
    ),
    View(
        "decoder",
        batches=True,
        parameters=(*_ALL, "image_datatype"),
        inputs=lambda engine: _latents(engine, "latent"),
        outputs=lambda engine: [_image(engine)],
        infer=_decode,
    ),
    View(
        "sampler",
        batches=False,
        parameters=(*_ALL, "image_datatype", "first_row", "temperature", "prior"),
        inputs=lambda engine: [Port("count", "INT32", (1,)), Port("seed", "UINT64", (1,), optional=True)],
        outputs=lambda engine: [_image(engine), *_latents(engine, "latent"), Port("seed", "UINT64", (1,))],
        infer=_sample,
    ),
]
