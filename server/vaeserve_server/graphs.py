"""Running ONNX graphs: the server's only file that imports onnxruntime, and its honesty about where they run.

`get_available_providers()` does not prove that a provider loads, and ONNX Runtime falls back to the CPU with a line on
standard output at most. So every session is asked what it really runs on, and its own fallbacks are off.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaeserve_server import pinned
from vaeserve_server.buckets import bucket_for, bucket_sizes
from vaeserve_server.bundle import Port, Precision
from vaeserve_server.errors import DeviceError, GraphLoadError, GraphRunError, NotServingError

# Version 1.29 and later report to their makers by default and keep a database in the user's cache.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime
from onnxruntime.capi import build_and_package_info

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_log = logging.getLogger(__name__)
_FATAL = 4
# With capture on, ONNX Runtime's first run of a shape takes memory, the second is captured, the third is a replay.
_CAPTURE_RUNS = 3
# A graph of one Identity node, x [n] -> y [n], in opset 13: something to load before there is a model.
_PROBE = (
    b'\x08\x08:=\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x05probeZ\x10\n\x01x\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01n'
    b"b\x10\n\x01y\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\r"
)
_INSTALL = 'install "vaeserve[server,cuda]" and an NVIDIA driver that goes with it'


@dataclass(frozen=True)
class CudaOptions:
    """How ONNX Runtime uses a GPU; see the settings of the same names. `gpu_memory_bytes` 0 sets no limit."""

    tf32: bool = False
    nhwc: bool = False
    gpu_memory_bytes: int = 0
    cuda_graphs: bool = False

    def provider_options(self) -> dict[str, str]:
        """Return them in the CUDA provider's words."""
        options = {
            # TF32 keeps 10 bits of a float32's mantissa: not the parity that the card promises.
            "use_tf32": str(int(self.tf32)),
            # cuDNN's own estimate. Trying all kernels takes seconds for each shape, and may choose others next time.
            "cudnn_conv_algo_search": "HEURISTIC",
            # Take what is needed, not the next power of two of it: other models and processes share the GPU.
            "arena_extend_strategy": "kSameAsRequested",
            "prefer_nhwc": str(int(self.nhwc)),
            "enable_cuda_graph": str(int(self.cuda_graphs)),
        }
        return options | ({"gpu_mem_limit": str(self.gpu_memory_bytes)} if self.gpu_memory_bytes else {})


class Graph:
    """One loaded graph. `run` may be called from several threads at once, and `stop` from any.

    Before it serves, run it with as many rows as each of `warm_rows`, in each thread if `warm_everywhere`.
    """

    warm_everywhere = False

    def __init__(self, session: onnxruntime.InferenceSession, max_rows: int) -> None:
        """Take a session that will run at most `max_rows` rows at once."""
        self.warm_rows: tuple[int, ...] = (1, max_rows)
        self._session = session
        self._run_options = _run_options()
        self.provider: str = session.get_providers()[0]
        self.metadata: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
        self.inputs = [_port(value) for value in session.get_inputs()]
        self.outputs = [_port(value) for value in session.get_outputs()]
        self._input_name = self.inputs[0].name if self.inputs else ""
        self._output_names = [port.name for port in self.outputs]

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return the outputs, each `(N, ...)`, for `batch` `(N, ...)`; GraphRunError if the run fails."""
        try:
            return self._run(batch)
        except Exception as error:
            if self.stopped:
                raise NotServingError("the model stopped being served while the call ran") from None
            raise GraphRunError(f"{type(error).__name__}: {error}") from error

    @property
    def stopped(self) -> bool:
        """Whether runs are refused."""
        stopped: bool = self._run_options.terminate
        return stopped

    def stop(self) -> None:
        """End the runs that are on, at their next node, and all later ones: they raise NotServingError."""
        self._run_options.terminate = True

    def resume(self) -> None:
        """Let runs through again."""
        self._run_options.terminate = False

    def unload(self) -> None:
        """Stop, and give the memory back as soon as no run is on."""
        self.stop()
        del self._session

    def _run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        outputs: list[NDArray[np.float32]] = self._session.run(
            self._output_names, {self._input_name: batch}, self._run_options
        )
        return outputs


NewHostArray = Callable[[tuple[int, ...]], NDArray[np.float32]]


class BoundGraph(Graph):
    """A graph on a device of its own memory: padded to one of a few sizes, whose buffers are there before it serves.

    Each thread has a set of buffers per size, bound once: rows are gathered in host memory that the device reads
    directly, copied, run, and copied back. With `capture` the kernels of a size are replayed as one CUDA graph.
    """

    warm_everywhere = True

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        max_rows: int,
        *,
        device: Literal["cuda", "cpu"],
        new_host_array: NewHostArray,
        capture: bool = False,
    ) -> None:
        super().__init__(session, max_rows)
        self._sizes = bucket_sizes(max_rows)
        self.warm_rows = tuple(size for size in self._sizes for _ in range(_CAPTURE_RUNS if capture else 1))
        self._device = device
        self._new_host_array = new_host_array
        self._capture = capture
        self._of_thread = threading.local()
        self._captures: list[onnxruntime.RunOptions] = []
        self._captures_lock = threading.Lock()

    def stop(self) -> None:
        """End the runs that are on, at their next node, and all later ones: they raise NotServingError."""
        with self._captures_lock:
            super().stop()
            for options in self._captures:
                options.terminate = True

    def resume(self) -> None:
        """Let runs through again."""
        with self._captures_lock:
            super().resume()
            for options in self._captures:
                options.terminate = False

    def unload(self) -> None:
        """Stop, and give the memory back as soon as no run is on."""
        super().unload()
        self._of_thread = threading.local()  # the buffers of every thread

    def _run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        size = bucket_for(len(batch), self._sizes)
        buffers: dict[int, _Buffers] = self._of_thread.__dict__.setdefault("buffers", {})
        if size not in buffers:
            buffers[size] = self._bind(size)
        return buffers[size].run(batch)

    def _bind(self, size: int) -> _Buffers:
        binding = self._session.io_binding()
        values = []
        for port in (*self.inputs, *self.outputs):
            dimensions = [size, *(axis or 0 for axis in port.shape[1:])]
            values.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(dimensions, np.float32, self._device, 0))
        binding.bind_ortvalue_input(self._input_name, values[0])
        for name, value in zip(self._output_names, values[1:], strict=True):
            binding.bind_ortvalue_output(name, value)
        shape = tuple(values[0].shape())
        # A thread has a CUDA context from its first call on; buffers out of the arena may have taken none.
        values[0].update_inplace(np.zeros(shape, np.float32))
        host = self._new_host_array(shape)
        options = self._options_of_capture(size) if self._capture else self._run_options
        return _Buffers(partial(self._session.run_with_iobinding, binding, options), host, values)

    def _options_of_capture(self, size: int) -> onnxruntime.RunOptions:
        """Return options of one binding alone: a thread that was lost may be back while its substitute runs."""
        options = _run_options()
        options.add_run_config_entry("gpu_graph_id", str(size))
        with self._captures_lock:
            options.terminate = self.stopped
            self._captures.append(options)
        return options


class _Buffers:
    """One thread's buffers for one size: host memory to gather rows in, and what the device reads and writes."""

    def __init__(
        self, run: Callable[[], None], host: NDArray[np.float32], values: Sequence[onnxruntime.OrtValue]
    ) -> None:
        self._run = run
        self._host = host
        self._input, *self._outputs = values

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return the outputs for the rows of `batch`, in arrays of their own."""
        rows = len(batch)
        self._host[:rows] = batch
        self._host[rows:] = 0  # nobody's rows
        self._input.update_inplace(self._host)
        self._run()
        return [self._own(output.numpy(), rows) for output in self._outputs]

    def _own(self, output: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
        """Return the first rows; from a device `output` is a copy already, on a CPU it is the next run's too."""
        return output[:rows].copy() if self._outputs[0].device_name() == "cpu" else output[:rows]


class Runtime:
    """Loads graphs on one device: `cuda`, `cpu`, or with `auto` the GPU if one can be used and else the CPU.

    `precision` is what encoders and decoders are to compute in, which is a matter of which graphs are loaded.
    `fell_back_to_cpu` is True if `auto` met a GPU build of ONNX Runtime that cannot use a GPU here.
    """

    def __init__(
        self,
        requested_device: Literal["auto", "cuda", "cpu"],
        cuda: CudaOptions | None = None,
        precision: Precision = "fp32",
    ) -> None:
        """Find out what works; DeviceError if `cuda` was asked for and does not."""
        onnxruntime.set_default_logger_severity(_FATAL)  # what fails raises, or is told from get_providers()
        self.requested_device = requested_device
        self.precision = precision
        self._cuda = cuda or CudaOptions()
        self.provider = CPU
        self.fell_back_to_cpu = False
        if requested_device == "cpu":
            return
        has_cuda = CUDA in onnxruntime.get_available_providers()
        problem = problem_of(CUDA) if has_cuda else f"ONNX Runtime is installed without {CUDA}"
        if not problem:
            self.provider = CUDA
        elif requested_device == "cuda":
            raise DeviceError(f"device cuda cannot be used: {problem}; {_INSTALL}, or choose --device cpu")
        elif has_cuda:
            self.fell_back_to_cpu = True
            _log.warning("no usable GPU, running on the CPU", extra={"fields": {"reason": problem}})

    def load(self, data: bytes, max_rows: int) -> Graph:
        """Return the graph of a serialised ONNX model, for runs of at most `max_rows` rows.

        GraphLoadError if ONNX Runtime refuses it; DeviceError if it would not run on the device.
        """
        session = _session(data, self.provider, self._cuda)
        graph = self._on_gpu(session, max_rows) if session.get_providers()[0] == CUDA else Graph(session, max_rows)
        if graph.provider != self.provider:
            raise DeviceError(f"the graph would run on {graph.provider}, not on {self.provider}; {_INSTALL}")
        return graph

    def _on_gpu(self, session: onnxruntime.InferenceSession, max_rows: int) -> BoundGraph:
        new_host_array = partial(pinned.page_locked, library=pinned.driver())
        capture = self._cuda.cuda_graphs
        return BoundGraph(session, max_rows, device="cuda", new_host_array=new_host_array, capture=capture)


class Build(NamedTuple):
    """What ONNX Runtime is installed: `cuda_version` is the one it is built for, '' if for none."""

    cuda_version: str
    providers: list[str]


def installed() -> Build:
    """Return what was built into ONNX Runtime, which is not yet what works."""
    return Build(getattr(build_and_package_info, "cuda_version", ""), onnxruntime.get_available_providers())


def problem_of(provider: str) -> str:
    """Return why CPU or CUDA cannot be used, '' if it can: nothing less than a run on it proves that."""
    if provider == CUDA:
        return _cuda_problem()
    try:
        Graph(_session(_PROBE, provider, CudaOptions()), 1).run(np.zeros(1, np.float32))
    except (GraphLoadError, GraphRunError) as error:
        return _one_line(error)
    return ""


def _cuda_problem() -> str:
    try:
        pinned.driver()
    except OSError:
        return "there is no NVIDIA driver (libcuda cannot be loaded)"
    missing = io.StringIO()  # preload_dlls() prints its failures
    with contextlib.redirect_stdout(missing):
        onnxruntime.preload_dlls()
    try:
        probe = Graph(_session(_PROBE, CUDA, CudaOptions()), 1)
        probe.run(np.zeros(1, np.float32))
    except (GraphLoadError, GraphRunError) as error:
        return _one_line(error)
    if probe.provider != CUDA:
        return _one_line(missing.getvalue()) or f"{CUDA} does not load"
    return ""


def _session(data: bytes, provider: str, cuda: CudaOptions) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # One thread a run, and several runs at once: on two cores twice the decode rate of one run with two threads.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _FATAL
    providers = [(CUDA, cuda.provider_options()), CPU] if provider == CUDA else [CPU]
    try:
        return onnxruntime.InferenceSession(
            data, options, providers=providers, enable_fallback=0, read_config_from_model=0
        )
    except Exception as error:
        raise GraphLoadError(_one_line(error)) from error


def _run_options() -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL
    return options


def _port(value: onnxruntime.NodeArg) -> Port:
    return Port(value.name, value.type, tuple(axis if isinstance(axis, int) else None for axis in value.shape))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
