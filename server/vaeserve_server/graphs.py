"""Running ONNX graphs: the server's only file that imports onnxruntime, and its honesty about where they run.

`get_available_providers()` does not prove that a provider loads, and ONNX Runtime falls back to the CPU with a line on
standard output at most. So every session is asked what it really runs on, and its own fallbacks are off.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vaeserve_server.bundle import Port
from vaeserve_server.errors import DeviceError, GraphLoadError, GraphRunError, NotServingError

# Version 1.29 and later report to their makers by default and keep a database in the user's cache.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_log = logging.getLogger(__name__)
_FATAL = 4
# A graph of one Identity node, x [n] -> y [n], in opset 13: something to load before there is a model.
_PROBE = (
    b'\x08\x08:=\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x05probeZ\x10\n\x01x\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01n'
    b"b\x10\n\x01y\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\r"
)
_INSTALL = 'install "vaeserve[server,cuda]" and an NVIDIA driver that goes with it'


class Graph:
    """One loaded graph. `run` may be called from several threads at once, and `stop` from any."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = _FATAL
        self.provider: str = session.get_providers()[0]
        self.metadata: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
        self.inputs = [_port(value) for value in session.get_inputs()]
        self.outputs = [_port(value) for value in session.get_outputs()]
        self._input_name = self.inputs[0].name if self.inputs else ""
        self._output_names = [port.name for port in self.outputs]

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return the outputs, each `(N, ...)`, for `batch` `(N, ...)`; GraphRunError if the run fails."""
        try:
            outputs: list[NDArray[np.float32]] = self._session.run(
                self._output_names, {self._input_name: batch}, self._run_options
            )
        except Exception as error:
            if self._run_options.terminate:
                raise NotServingError("the model stopped being served while the call ran") from None
            raise GraphRunError(f"{type(error).__name__}: {error}") from error
        return outputs

    def stop(self) -> None:
        """End the runs that are on, at their next node, and all later ones: they raise NotServingError."""
        self._run_options.terminate = True


class Runtime:
    """Loads graphs on one device: `cuda`, `cpu`, or with `auto` the GPU if one can be used and else the CPU.

    `fell_back_to_cpu` is True if `auto` met a GPU build of ONNX Runtime that cannot use a GPU here.
    """

    def __init__(self, requested_device: Literal["auto", "cuda", "cpu"]) -> None:
        """Find out what works; DeviceError if `cuda` was asked for and does not."""
        onnxruntime.set_default_logger_severity(_FATAL)  # what fails raises, or is told from get_providers()
        self.requested_device = requested_device
        self.provider = CPU
        self.fell_back_to_cpu = False
        if requested_device == "cpu":
            return
        has_cuda = CUDA in onnxruntime.get_available_providers()
        problem = _cuda_problem() if has_cuda else f"ONNX Runtime is installed without {CUDA}"
        if not problem:
            self.provider = CUDA
        elif requested_device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {problem}; {_INSTALL}, or choose --device cpu")
        elif has_cuda:
            self.fell_back_to_cpu = True
            _log.warning("no usable GPU, running on the CPU", extra={"fields": {"reason": problem}})

    def load(self, data: bytes) -> Graph:
        """Return the graph of a serialised ONNX model.

        GraphLoadError if ONNX Runtime refuses it; DeviceError if it would not run on the device.
        """
        graph = Graph(_session(data, self.provider))
        if graph.provider != self.provider:
            raise DeviceError(f"the graph would run on {graph.provider}, not on {self.provider}; {_INSTALL}")
        return graph


def _cuda_problem() -> str:
    """Return why CUDA cannot be used, '' if it can: nothing less than a run on it proves that."""
    try:
        ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return "there is no NVIDIA driver (libcuda cannot be loaded)"
    missing = io.StringIO()  # preload_dlls() prints its failures
    with contextlib.redirect_stdout(missing):
        onnxruntime.preload_dlls()
    try:
        probe = Graph(_session(_PROBE, CUDA))
        probe.run(np.zeros(1, np.float32))
    except (GraphLoadError, GraphRunError) as error:
        return _one_line(error)
    if probe.provider != CUDA:
        return _one_line(missing.getvalue()) or f"{CUDA} does not load"
    return ""


def _session(data: bytes, provider: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # One thread a run, and several runs at once: on two cores twice the decode rate of one run with two threads.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _FATAL
    # TF32 keeps 10 bits of a float32's mantissa: not the parity that the card promises.
    providers = [(CUDA, {"use_tf32": "0"}), CPU] if provider == CUDA else [CPU]
    try:
        return onnxruntime.InferenceSession(
            data, options, providers=providers, enable_fallback=0, read_config_from_model=0
        )
    except Exception as error:
        raise GraphLoadError(_one_line(error)) from error


def _port(value: onnxruntime.NodeArg) -> Port:
    return Port(value.name, value.type, tuple(axis if isinstance(axis, int) else None for axis in value.shape))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
