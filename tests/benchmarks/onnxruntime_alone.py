"""ONNX Runtime's own speed on a bundle's graphs, in a process of its own: the limit that serving is measured against.

On a CPU every batch size is run by one- and by many-thread sessions, from one and from many threads; the best counts.
On a GPU the provider has the server's options, and the inputs and outputs are bound: to device memory, with the copies
in and out that any server has to make.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

import children
from vaeserve_server.graphs import CUDA, CudaOptions

Floats = NDArray[np.float32]


class Alone:
    """The sessions of one bundle's graphs. `cores` is how many threads "many" are."""

    def __init__(self, bundle: Path, provider: str, cores: int) -> None:
        if provider == CUDA:
            onnxruntime.preload_dlls()
        self._bundle = bundle
        self._provider = provider
        # (threads inside a run, runs at once)
        counts = (1, cores)
        self._settings = [(1, 1), (1, 2)] if provider == CUDA else sorted({(i, r) for i in counts for r in counts})
        self._sessions: dict[tuple[str, int], onnxruntime.InferenceSession] = {}

    def measure(
        self, graph: str, batches: list[int], seconds: float, setting: str | None = None
    ) -> dict[str, dict[str, float]]:
        """Return images a second by batch size and setting ("threads inside a run x runs at once"), all or the one."""
        return {
            str(rows): {
                f"{threads} x {runs}": self._images_per_s(graph, rows, threads, runs, seconds)
                for threads, runs in self._settings
                if setting in (None, f"{threads} x {runs}")
            }
            for rows in batches
        }

    def _images_per_s(self, graph: str, rows: int, threads: int, runs: int, seconds: float) -> float:
        session = self._session(graph, threads)
        counts = [0] * runs
        barrier = threading.Barrier(runs + 1)
        until = [0.0]

        def work(which: int) -> None:
            run = _bound(session, rows) if self._provider == CUDA else _plain(session, rows)
            run()  # the first run of a shape is not like the others
            barrier.wait()
            barrier.wait()
            while time.perf_counter() < until[0]:
                run()
                counts[which] += 1

        workers = [threading.Thread(target=work, args=(which,)) for which in range(runs)]
        for each in workers:
            each.start()
        barrier.wait()
        began = time.perf_counter()
        until[0] = began + seconds
        barrier.wait()
        for each in workers:
            each.join()
        return rows * sum(counts) / (time.perf_counter() - began)

    def _session(self, graph: str, threads: int) -> onnxruntime.InferenceSession:
        if (graph, threads) not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            provider_options = CudaOptions().provider_options() if self._provider == CUDA else {}
            session = onnxruntime.InferenceSession(
                self._bundle / f"{graph}.onnx", options, providers=[(self._provider, provider_options)]
            )
            if session.get_providers()[0] != self._provider:
                raise children.BenchError(f"the graph runs on {session.get_providers()[0]}, not on {self._provider}")
            self._sessions[graph, threads] = session
        return self._sessions[graph, threads]


def _plain(session: onnxruntime.InferenceSession, rows: int) -> Callable[[], Any]:
    feed = {session.get_inputs()[0].name: _input(session, rows)}
    return lambda: session.run(None, feed)


def _bound(session: onnxruntime.InferenceSession, rows: int) -> Callable[[], Any]:
    batch = _input(session, rows)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(batch, "cuda", 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", 0)

    def run() -> Any:
        value.update_inplace(batch)
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    return run


def _input(session: onnxruntime.InferenceSession, rows: int) -> Floats:
    shape = (rows, *session.get_inputs()[0].shape[1:])
    return np.random.default_rng(0).random(shape, dtype=np.float32)


if __name__ == "__main__":
    children.serve({"measure": Alone(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])).measure})
