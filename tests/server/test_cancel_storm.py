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

import metrics_page
import serving
from bundles import ENCODER, slow_encoder, write_bundle
from serving import running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

IN_A_ROW = 10_000
CALLS = 150  # at once; of more than 256 on a connection grpcio lets go in its own time, and refuses others meanwhile
WARM_STORMS, STORMS = 8, IN_A_ROW // CALLS + 1
IMAGE, LATENT = (1, 4, 4), (3,)
MUCH_TOO_LONG = 1.0


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


def slow_request(pixel: float) -> pb.EncodeRequest:
    return pb.EncodeRequest(images=tensors.to_tensor(np.full((1, *IMAGE), pixel, np.float32)))


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


def test_ten_thousand_cancels_in_a_row_leave_no_task_no_row_and_no_call(tmp_path: Path) -> None:
    """They wait behind a run that takes its time, so that each is cancelled where it is: in the queue or before it.

    That run's call has a connection of its own: Envoy's HTTP/2 library closes one that cancels a thousand at once.
    """
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT, graphs={ENCODER: slow_encoder(IMAGE, LATENT)})
    with (
        running_server(tmp_path, threads=1, watchdog_s=0) as server,
        grpc.insecure_channel(server.target) as channel,
        grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as of_its_own,
    ):
        stub = vae_pb2_grpc.VaeServiceStub(channel)
        assert stub.Encode(slow_request(0.0)).mean.shape == [1, 3]
        before: list[int] = []
        server.until(lambda running: before.append(serving.tasks(running)) is None and running._calls._in_flight == 0)
        slow = vae_pb2_grpc.VaeServiceStub(of_its_own).Encode.future(slow_request(MUCH_TOO_LONG))
        server.until(lambda running: running._calls._in_flight == 1)
        for at in range(IN_A_ROW):
            call = stub.Encode.future(slow_request(1.0))
            if at % 100 == 0:
                server.until(lambda running, call=call: serving.queued_rows(running) > 0 or call.done())
            call.cancel()
        server.until(lambda running: serving.queued_rows(running) == 0 and running._calls._in_flight == 1)
        assert not slow.done()
        slow.cancel()
        server.until(lambda running: serving.tasks(running) <= before[-1] and running._calls._in_flight == 0)
        page = metrics_page.read(metrics_page.url(server))
        assert page("vaeserve_batch_rows_sum", graph="encoder") == 1  # none of them ever ran
        assert page("vaeserve_cancelled_total", rpc="Encode") > 0
