"""Storms of calls that nobody waits for: a server that went through many is no larger than one that met a few."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import serving
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

WARM_STORMS, STORMS, CALLS = 8, 24, 150


@pytest.fixture
def process(models_dir: Path) -> Iterator[tuple[int, str]]:
    """A server process: its id, and its address."""
    command = [sys.executable, "-m", "vaeserve_server", "--models", str(models_dir), "--port", "0", "--device", "cpu"]
    command += ["--threads", "1", "--metrics-port", "0", "--transport", serving.default_transport]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout is not None
            yield popen.pid, popen.stdout.readline().split(" on ")[1].split(" ")[0]
        finally:
            popen.kill()


def resident_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (kb,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return kb


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_flat_however_many_calls_were_cancelled(
    process: tuple[int, str], test_images: NDArray[np.uint8]
) -> None:
    pid, target = process
    request = pb.EncodeRequest(images=tensors.to_tensor(test_images[:2]), want_latents=True, seed=1)
    sizes = []
    with grpc.insecure_channel(target) as channel:
        stub = vae_pb2_grpc.VaeServiceStub(channel)
        for _ in range(STORMS):
            calls = [stub.Encode.future(request) for _ in range(CALLS)]
            for call in calls:
                call.cancel()
            assert len(tensors.from_tensor(stub.Encode(request).mean)) == 2  # and so it serves on
            sizes.append(resident_kb(pid))
    assert np.median(sizes[-WARM_STORMS:]) <= 1.1 * np.median(sizes[:WARM_STORMS])
