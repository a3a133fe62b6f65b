"""ONNX Runtime's own throughput on a bundle's graphs: the limit that the quickstart's service is measured against.

A process of its own, so that its threads are not the client's. It reads one of "encode" and "decode" a line from
standard input, runs every setting once over the images, and answers with one line of JSON: images a second by setting.

    python client/examples/onnxruntime_speed.py models/mnist/1 CPUExecutionProvider images.npy
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

BATCH_ROWS = 256
CPU = "CPUExecutionProvider"


class Setting:
    """One way to run a graph on a CPU: threads inside a run, and runs at once."""

    def __init__(self, graph: Path, provider: str, intra_op_threads: int, runs_at_once: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op_threads
        options.inter_op_num_threads = 1
        self.name = f"{intra_op_threads} intra-op, {runs_at_once} at once"
        self._session = onnxruntime.InferenceSession(graph, options, providers=[provider])
        self._pool = concurrent.futures.ThreadPoolExecutor(runs_at_once)
        self._input = self._session.get_inputs()[0].name

    def images_per_s(self, rows: NDArray[np.float32]) -> float:
        """Run all rows once, in batches."""
        batches = [rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]
        began = time.perf_counter()
        list(self._pool.map(self._run, batches))
        return len(rows) / (time.perf_counter() - began)

    def run_all(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the first output for all rows."""
        return np.concatenate([self._run(rows[at : at + BATCH_ROWS])[0] for at in range(0, len(rows), BATCH_ROWS)])

    def _run(self, batch: NDArray[np.float32]) -> Any:
        return self._session.run(None, {self._input: batch})


def settings(graph: Path, provider: str) -> list[Setting]:
    """Return the settings worth trying: on a CPU one thread, and two in either way; elsewhere threads do not matter."""
    two_ways = [(2, 1), (1, 2)] if provider == CPU and (os.cpu_count() or 1) > 1 else []
    return [Setting(graph, provider, *threads) for threads in [(1, 1), *two_ways]]


def main() -> None:
    """Answer until standard input ends."""
    bundle, provider, images_file = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    if provider != CPU:
        onnxruntime.preload_dlls()
    images = np.load(images_file, allow_pickle=False).astype(np.float32) / np.float32(255)
    encoders = settings(bundle / "encoder.onnx", provider)
    decoders = settings(bundle / "decoder.onnx", provider)
    work = {"encode": (encoders, images), "decode": (decoders, encoders[0].run_all(images))}
    for line in sys.stdin:
        tried, rows = work[line.strip()]
        print(json.dumps({setting.name: setting.images_per_s(rows) for setting in tried}), flush=True)


if __name__ == "__main__":
    main()
