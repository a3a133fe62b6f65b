"""Faults from outside: a server that is killed, a clock that jumps, a folder that nobody may write to."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

import processes
import serving
from bundles import ENCODER, run_directly, write_quick_and_slow
from metrics_page import read
from processes import COMMAND, Process, server_process
from vaeserve import Client, errors, tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc

IMAGE, LATENT = (1, 4, 4), (3,)
LIMIT_S = 120.0  # of what takes seconds, on a machine that has other work
LIBRARIES = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))  # Debian's libfaketime


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quick_and_slow(tmp_path_factory.mktemp("models"), IMAGE, LATENT)


def test_a_server_killed_under_load_and_started_again_on_its_port_is_found_by_its_clients(models: Path) -> None:
    """A client loses the calls of the outage at most, as Unavailable, and no answer is wrong before or after."""
    images = np.random.default_rng(1).random((5, *IMAGE), np.float32)
    right = run_directly(models / "quick" / "1", ENCODER, images)[0]
    stop, killed = threading.Event(), threading.Event()
    answers: list[bool] = []  # after the kill?
    problems: list[Exception] = []

    def load(target: str) -> None:
        with Client(target, model="quick") as client:
            while not stop.is_set():
                try:
                    mean = client.encode(images).mean
                except errors.Unavailable:
                    with contextlib.suppress(errors.DeadlineExceeded):
                        client.wait_ready(1.0)
                except Exception as error:  # noqa: BLE001 - told by the test
                    problems.append(error)
                else:
                    np.testing.assert_allclose(mean, right, rtol=1e-5, atol=1e-6)
                    answers.append(killed.is_set())

    def wait_for(after: bool, count: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while answers.count(after) < count:
            assert time.monotonic() < deadline, problems
            time.sleep(0.01)

    with server_process(models) as first:
        callers = [threading.Thread(target=load, args=(first.target,)) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            wait_for(False, 50)
            first.signal(signal.SIGKILL)
            first.popen.wait(LIMIT_S)
            answers.clear()
            killed.set()
            with server_process(models, port=int(first.target.rpartition(":")[2])) as second:
                assert second.target == first.target
                wait_for(True, 50)
                stop.set()
                for caller in callers:
                    caller.join(LIMIT_S)
                second.signal(signal.SIGTERM)
                assert second.end()[0] == 0
        finally:
            stop.set()
    assert not problems


@contextlib.contextmanager
def in_time(models: Path, clock: Path, *flags: str) -> Iterator[tuple[Process, str]]:
    """Start a server that lives in the time that the file `clock` says; yield it and the address of its metrics."""
    variables = faked(clock)
    command = [*COMMAND, "--models", str(models), "--port", "0", "--device", "cpu", *flags]
    with (clock.with_name("log")).open("w+") as log:
        popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables)
        try:
            process = Process(popen)
            said = clock.with_name("log").read_text()
            yield process, said.partition("metrics url=")[2].split()[0]
        finally:
            popen.kill()
            popen.communicate()


def faked(clock: Path) -> dict[str, str]:
    return processes.ENVIRONMENT | {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # which no clock that is set ever is
    }


def slow(channel: grpc.Channel, pixel: float, timeout_s: float) -> grpc.Future:
    images = tensors.to_tensor(np.full((1, *IMAGE), pixel, np.float32))
    request = pb.EncodeRequest(model=pb.ModelRef(name="slow"), images=images)
    return vae_pb2_grpc.VaeServiceStub(channel).Encode.future(request, timeout=timeout_s)


@pytest.mark.skipif(not LIBRARIES, reason="needs Debian's libfaketime")
@pytest.mark.skipif(serving.default_transport == "envoy", reason="Envoy's process preloads a library of its own")
def test_a_clock_that_jumps_is_not_noticed(models: Path, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    flags = ["--watchdog-s", str(serving.PATIENT_WATCHDOG_S), "--threads", "2"]
    with in_time(models, clock, *flags) as (process, url), grpc.insecure_channel(process.target) as channel:
        with Client(process.target, model="quick", timeout_s=LIMIT_S) as client:
            for jump in ("+2d", "-3d", "+1y", "+0"):
                in_flight = slow(channel, 0.005, LIMIT_S)
                client.sample(3)
                clock.write_text(jump)
                assert client.sample(3, seed=1).images.shape == (3, *IMAGE)
                assert client.healthy()
                assert in_flight.result().mean.shape == [1, 3]
                began = time.monotonic()
                with pytest.raises(grpc.RpcError) as late:
                    slow(channel, 0.02, 0.1).result()  # more than a second of work, in a tenth of one
                assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                assert time.monotonic() - began < LIMIT_S  # and not in two days
        page = read(url)
        assert page("vaeserve_model_serving") == 2
        assert page("vaeserve_call_duration_seconds_sum") < 3600  # the smallest jump is of two days
        process.signal(signal.SIGTERM)
        assert process.popen.wait(LIMIT_S) == 0


@pytest.mark.skipif(not LIBRARIES, reason="needs Debian's libfaketime")
def test_a_client_whose_clock_jumps_keeps_its_deadlines(models: Path, tmp_path: Path) -> None:
    program = """
import pathlib, sys, time
from vaeserve import Client, errors
clock = pathlib.Path(sys.argv[2])
with Client(sys.argv[1], model="quick") as client:
    for jump in ("+0", "+2d", "-3d"):
        before = time.time()
        clock.write_text(jump)
        assert jump == "+0" or abs(time.time() - before) > 80_000, "the clock does not jump"
        assert len(client.sample(3, timeout_s=30).images) == 3
"""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    with server_process(models) as process:
        subprocess.run(
            [sys.executable, "-c", program, process.target, str(clock)], env=faked(clock), check=True, timeout=LIMIT_S
        )


def can_mount() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
def test_a_models_folder_that_is_read_only_is_served(models: Path) -> None:
    script = (
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/x" 2>/dev/null && shift && exec "$@"'
    )
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(models)]
    command += [*COMMAND, "--models", str(models), "--port", "0", "--device", "cpu", "--watch-s", "0.05"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=processes.ENVIRONMENT
    ) as popen:
        try:
            process = Process(popen)
            with Client(process.target, model="quick") as client:
                assert client.encode(np.zeros((2, *IMAGE), np.uint8)).mean.shape == (2, 3)
                process.signal(signal.SIGHUP)
                assert client.healthy()
            process.signal(signal.SIGTERM)
            status, log = process.end()
        finally:
            popen.kill()
    assert status == 0
    assert "ERROR" not in log


def test_callers_who_left_are_no_errors_in_the_log(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving.running_server(models, transport="grpc"):
        log = logging.getLogger("grpc._cython.cygrpc")
        log.error("ExecuteBatchError raised in core by servicer method [%s]", "/vaeserve.v1.VaeService/Encode")
        log.error("anything else")
    assert [record.message for record in caplog.records] == ["anything else"]
