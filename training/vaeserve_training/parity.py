"""Prove that ONNX Runtime computes from a graph what PyTorch computes from the module, or refuse it.

Every row of a fixed set of inputs, ordinary and extreme, goes through both in batches of several sizes. Beside the gate
on their difference it is measured by how much ONNX Runtime's own answer for a row depends on the batch that it is in.
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vaeserve.v1 import vae_pb2
from vaeserve_training.compute import cpu_threads
from vaeserve_training.onnx_graphs import ExportError

# Version 1.29 and later report to their makers by default and keep a database in the user's cache. So this is the only
# module of training that imports ONNX Runtime.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

ONNXRUNTIME_VERSION: str = onnxruntime.__version__
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
BATCH_SIZES = (1, 2, 7, 64)
ROWS = 448  # a multiple of every batch size
TOLERANCE = 1e-5
# Float16 keeps 11 bits, and a graph rounds at every node: a sound one came to 0.005 at most. What is further away than
# this is broken rather than rounded; how far it is stands in the card.
FLOAT16_TOLERANCE = 0.02
RELATIVE_FLOOR = 1e-3  # relative errors are taken where |torch| is at least this
EXTREME_LATENT = 1000.0
_SEED = 0
_FATAL = 4  # ONNX Runtime's log severity

Array = NDArray[np.float32]


def image_inputs(images: NDArray[np.uint8]) -> Array:
    """Return ROWS images in 0..1, (ROWS, C, H, W): real ones, grey and binarised, all 0, all 1, and noise.

    `images` are real ones, uint8 (M, C, H, W), M >= 1; they are repeated if they are few.
    """
    rng = np.random.default_rng(_SEED)
    real = (images[np.arange(128) % len(images)] / 255).astype(np.float32)
    shape = real.shape[1:]
    parts: list[NDArray[np.generic]] = [
        real,
        rng.random(real.shape) < real,
        np.zeros((32, *shape)),
        np.ones((32, *shape)),
        rng.random((64, *shape)),
        rng.random((64, *shape)) < 0.5,
    ]
    return _inputs(parts)


def latent_inputs(means: Array) -> Array:
    """Return ROWS latents, (ROWS, *latent_shape): posterior means, N(0, 1), and up to +-EXTREME_LATENT in many ways.

    `means` are posterior means of real images, (M, *latent_shape), M >= 1; they are repeated if they are few.
    """
    rng = np.random.default_rng(_SEED)
    real = means[np.arange(64) % len(means)]
    size = real[0].size
    corners = rng.choice([-EXTREME_LATENT, EXTREME_LATENT], (64, size))
    normal = rng.standard_normal((64, size))
    one_extreme = np.where(np.arange(64)[:, None] % size == np.arange(size), corners, normal)
    parts: list[NDArray[np.generic]] = [
        real.reshape(64, size),
        normal,
        corners,
        one_extreme,
        np.where(rng.random((64, size)) < 0.5, corners, rng.standard_normal((64, size))),
        rng.uniform(-EXTREME_LATENT, EXTREME_LATENT, (64, size)),
        rng.uniform(-10, 10, (63, size)),
        np.zeros((1, size)),
    ]
    return _inputs(parts).reshape(ROWS, *means.shape[1:])


def measure(
    file: str, content: bytes, module: nn.Module, inputs: Array, tolerance: float = TOLERANCE
) -> list[vae_pb2.Parity]:
    """Return the measured differences on the CPU, and on CUDA where ONNX Runtime really runs on it.

    `inputs` are float32 (ROWS, ...); `module` is on the CPU and takes what the graph takes. Raises ExportError, naming
    `file` and the worst value, unless |onnx - torch| <= tolerance * (1 + |torch|) everywhere.
    """
    expected = {size: _run_module(module, inputs, size) for size in BATCH_SIZES}
    sessions = [_session(content, CPU)]
    if _has_cuda():
        sessions += [session for session in [_session(content, CUDA)] if session.get_providers()[0] == CUDA]
    try:
        return [_measure_session(file, session, inputs, expected, tolerance) for session in sessions]
    except ExportError as error:
        if tolerance > TOLERANCE:  # not a float32 graph
            raise
        raise ExportError(f"{error}{_rounding(module, inputs, expected[BATCH_SIZES[-1]])}") from error


def _rounding(module: nn.Module, inputs: Array, expected: list[Array]) -> str:
    """Return a word on it if float32 itself does not determine these answers to within the gate, '' if it does."""
    with torch.inference_mode(), cpu_threads(1):
        result = copy.deepcopy(module).double()(torch.from_numpy(inputs).double())
    exact = [part.numpy() for part in (result if isinstance(result, tuple) else (result,))]
    with np.errstate(invalid="ignore"):  # a model that gives infinity has other troubles
        worst = max(float(np.abs(one - other).max()) for one, other in zip(exact, expected, strict=True))
    if not worst > TOLERANCE / 2:
        return ""
    return (
        f". PyTorch's own float32 results are up to {worst:.1e} away from its float64 ones on these inputs: the "
        "weights have grown so large that rounding decides; train with a lower learning rate or more weight decay"
    )


def _measure_session(
    file: str,
    session: onnxruntime.InferenceSession,
    inputs: Array,
    expected: dict[int, list[Array]],
    tolerance: float,
) -> vae_pb2.Parity:
    names = [output.name for output in session.get_outputs()]
    parity = vae_pb2.Parity(provider=session.get_providers()[0], batch_sizes=BATCH_SIZES)
    found = {size: _run_session(session, inputs, size) for size in BATCH_SIZES}
    for size in BATCH_SIZES:
        for name, onnx, torch_ in zip(names, found[size], expected[size], strict=True):
            where = f"{file} on {parity.provider}: output {name} at batch size {size}"
            error = _checked_error(where, onnx, torch_, tolerance)
            large = np.abs(torch_) >= RELATIVE_FLOOR
            relative = (error[large] / np.abs(torch_[large])).max(initial=0.0)
            parity.max_abs_error = max(parity.max_abs_error, float(error.max()))
            parity.max_rel_error = max(parity.max_rel_error, float(relative))
    for outputs in zip(*found.values(), strict=True):  # the same output at each batch size
        parity.max_batch_error = max(parity.max_batch_error, float(np.ptp(np.stack(outputs), axis=0).max()))
    return parity


def _checked_error(where: str, onnx: Array, torch_: Array, tolerance: float) -> NDArray[np.float64]:
    """Return |onnx - torch|, or raise ExportError unless all of it is within the gate; NaN and infinity never are."""
    if onnx.shape != torch_.shape:
        raise ExportError(f"{where} has shape {onnx.shape}; PyTorch gives {torch_.shape}")
    finite = np.isfinite(onnx) & np.isfinite(torch_)
    expected = np.where(finite, torch_, 0).astype(np.float64)
    error = np.where(finite, np.abs(np.where(finite, onnx, 0) - expected), np.inf)
    ratio = error / (tolerance * (1 + np.abs(expected)))
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    if ratio[worst] <= 1:
        return error
    raise ExportError(
        f"{where} is {onnx[worst]:.9g} where PyTorch gives {torch_[worst]:.9g} (input row {worst[0]}); allowed are "
        f"{tolerance:g} * (1 + |torch|). Nothing was published"
    )


def _run_module(module: nn.Module, inputs: Array, batch_size: int) -> list[Array]:
    # These runs are small: on a busy machine threads would mostly wait for each other.
    with torch.inference_mode(), cpu_threads(1):
        results = [module(torch.from_numpy(batch)) for batch in _batches(inputs, batch_size)]
    columns = zip(*(result if isinstance(result, tuple) else (result,) for result in results), strict=True)
    return [torch.cat(column).numpy() for column in columns]


def _run_session(session: onnxruntime.InferenceSession, inputs: Array, batch_size: int) -> list[Array]:
    name = session.get_inputs()[0].name
    results = [session.run(None, {name: batch}) for batch in _batches(inputs, batch_size)]
    return [np.concatenate(column) for column in zip(*results, strict=True)]


def _batches(inputs: Array, size: int) -> Sequence[Array]:
    return [inputs[first : first + size] for first in range(0, len(inputs), size)]


def _session(content: bytes, provider: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as the server runs it
    options.log_severity_level = _FATAL  # what fails raises, or is told from get_providers()
    # TF32 rounds to 10 bits, which is a hundred times the gate.
    settings = {"use_tf32": "0"} if provider == CUDA else {}
    return onnxruntime.InferenceSession(content, options, providers=[(provider, settings)])


def _has_cuda() -> bool:
    """Whether it is worth trying CUDA: the provider is installed and there is a driver."""
    if CUDA not in onnxruntime.get_available_providers():
        return False
    try:
        ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return False
    onnxruntime.preload_dlls()
    return True


def _inputs(parts: Sequence[NDArray[np.generic]]) -> Array:
    """Join the parts as float32, mixed so that every batch holds several kinds of rows."""
    joined = np.concatenate([part.astype(np.float32) for part in parts])
    order = np.random.default_rng(_SEED).permutation(len(joined))
    return np.ascontiguousarray(joined[order])
