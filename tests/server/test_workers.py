"""Several processes on one port: found by clients, watched, restarted, drained, and honest when none can start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from bundles import ENCODER, run_directly, write_quick_and_slow
from metrics_page import read_until
from serving import PATIENT_WATCHDOG_S
from vaeserve import AsyncClient, Client, tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import supervisor
from vaeserve_server.addresses import check_free, reserve
from vaeserve_server.errors import ListenError, StartError
from vaeserve_server.settings import Settings, from_command_line

IMAGE, LATENT = (1, 4, 4), (3,)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("VAESERVE_", "GRPC_"))}
COMMAND = [sys.executable, "-m", "vaeserve_server", "--device", "cpu", "--metrics-port", "0"]
LIMIT_S = 90.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quick_and_slow(tmp_path_factory.mktemp("models"), IMAGE, LATENT)


class Supervised:
    """A supervisor, and what it and its workers have logged."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen
        self.log = ""
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        assert self.popen.stdout is not None
        self.ready_line = self.popen.stdout.readline().rstrip("\n")
        assert self.ready_line, f"the server did not start: {self.log}"
        self.target = self.ready_line.split(" on ")[1].split(" ")[0]
        self.port = int(self.target.rpartition(":")[2])
        self.until(lambda: len(self.pids()) == int(self.ready_line.split(", ")[-1].split(" ")[0]))

    def pids(self) -> list[int]:
        """Return the processes that came to serve, the dead ones too, in that order."""
        return [int(pid) for pid in re.findall(r"worker ready pid=(\d+)", self.log)]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, looked at after each line of the log."""
        with self._more:
            assert self._more.wait_for(condition, LIMIT_S), self.log

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        status = self.popen.wait(2 * LIMIT_S)  # a drain may take one of them
        self.join()
        return status

    def join(self) -> None:
        """Wait until nobody holds the log open any more."""
        self._reader.join(LIMIT_S)
        assert not self._reader.is_alive()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self._more:
                self.log += line
                self._more.notify_all()


@contextlib.contextmanager
def supervised(models: Path, *flags: str) -> Iterator[Supervised]:
    command = [*COMMAND, "--models", str(models), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as popen:
        server = Supervised(popen)
        try:
            server.wait_ready()
            yield server
        finally:
            popen.kill()  # the workers see it, and end
            server.join()


def connections_of(pid: int, port: int) -> int:
    """Return how many established connections to `port` a process has accepted."""
    established, row = "01", re.compile(r"\s*\d+: \w+:(\w+) \S+ (\w+) \S+ \S+ \S+ +\d+ +\d+ (\d+)")
    inodes = set()
    tables = [Path(f"/proc/{pid}/net/{table}").read_text() for table in ("tcp", "tcp6")]
    for line in "".join(tables).splitlines():
        found = row.match(line)
        if found and int(found[1], 16) == port and found[2] == established:
            inodes.add(f"socket:[{found[3]}]")
    return sum(str(file.readlink()) in inodes for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink())


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
def test_workers_share_one_port_and_clients_spread_over_them(models: Path) -> None:
    images = np.random.default_rng(1).random((24, *IMAGE), np.float32)
    with supervised(models, "--workers", "2", "--threads", "2") as server:
        assert server.ready_line == f"serving quick/1, slow/1 on {server.target} (CPUExecutionProvider), 2 workers"
        assert len(set(server.pids())) == 2
        with Client(server.target, model="quick", connections=24, rows_per_call=1) as client:
            assert client.healthy()
            codes = client.encode(images)
            direct = run_directly(models / "quick" / "1", ENCODER, images)[0]
            np.testing.assert_allclose(codes.mean, direct, rtol=1e-5, atol=1e-6)
            assert all(connections_of(pid, server.port) > 0 for pid in server.pids())  # by 24 throws of a coin
        assert server.end() == 0
    assert "Traceback" not in server.log


def test_one_page_has_the_metrics_of_all_workers(models: Path) -> None:
    with supervised(models, "--workers", "2", "--threads", "2") as server:
        (url,) = re.findall(r"INFO metrics url=(\S+)", server.log)
        with Client(server.target, model="quick", connections=8, rows_per_call=1) as client:
            client.encode(np.zeros((40, *IMAGE), np.float32))
        page = read_until(url, lambda page: page("vaeserve_calls_total", rpc="Encode") == 40)
        assert page("vaeserve_workers") == 2
        assert set(page.by("worker", "vaeserve_calls_total")) == {"0", "1"}
        assert page("vaeserve_rows_total", worker="0") + page("vaeserve_rows_total", worker="1") == 40
        assert page("vaeserve_model_versions", worker="1", model="quick") == 1
        os.kill(server.pids()[0], signal.SIGKILL)
        read_until(url, lambda page: page("vaeserve_workers") == 1)
        read_until(url, lambda page: page("vaeserve_workers") == 2)
        assert server.end() == 0


def test_a_worker_killed_under_load_loses_no_call_and_comes_back(models: Path) -> None:
    stop = threading.Event()
    answered = threading.Semaphore(0)

    async def load(target: str, image: np.ndarray) -> int:
        async with AsyncClient(target, model="quick", connections=8, timeout_s=60) as client:

            async def call() -> int:
                calls = 0
                while not stop.is_set():
                    await client.encode(image)
                    answered.release()
                    calls += 1
                return calls

            return sum(await asyncio.gather(*(call() for _ in range(16))))

    def answers(calls: int) -> None:
        for _ in range(calls):
            assert answered.acquire(timeout=LIMIT_S)

    with supervised(models, "--workers", "2") as server:
        counts: list[int] = []
        loader = threading.Thread(
            target=lambda: counts.append(asyncio.run(load(server.target, np.zeros((1, *IMAGE), np.uint8))))
        )
        loader.start()
        try:
            answers(50)
            killed = server.pids()[0]
            os.kill(killed, signal.SIGKILL)
            server.until(lambda: len(server.pids()) == 3)
            answers(50)
        finally:
            stop.set()
            loader.join(LIMIT_S)
        assert counts  # or a call failed, and with it the load
        assert counts[0] >= 100
        assert f'a worker ended pid={killed} status="signal SIGKILL" restart_in_s=0.2' in server.log
        assert not is_alive(killed)
        with Client(server.target, model="quick") as client:
            assert client.encode(np.zeros((2, *IMAGE), np.uint8)).mean.shape == (2, 3)
        assert server.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all_workers(models: Path, number: signal.Signals) -> None:
    patience = ["--drain-s", str(LIMIT_S), "--watchdog-s", str(PATIENT_WATCHDOG_S)]  # the runs may come to lie in one
    with supervised(models, "--workers", "2", *patience) as server, contextlib.ExitStack() as stack:
        calls = [start_slow_call(stack.enter_context(own_connection(server.target))) for _ in range(4)]
        assert server.end(number) == 0
        assert [call.result().mean.shape for call in calls] == [[1, 3]] * 4
    assert server.log.count("INFO draining") == 2
    assert "all workers stopped" in server.log
    assert "Traceback" not in server.log
    assert not any(is_alive(pid) for pid in server.pids())


def own_connection(target: str) -> grpc.Channel:
    return grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])


def start_slow_call(channel: grpc.Channel) -> grpc.Future:
    """Send a call that takes a while and return once a worker has it: calls arrive in order on one connection."""
    stub = vae_pb2_grpc.VaeServiceStub(channel)
    stub.ListModels(pb.ListModelsRequest())
    images = tensors.to_tensor(np.full((1, *IMAGE), 0.005, np.float32))
    call = stub.Encode.future(pb.EncodeRequest(model=pb.ModelRef(name="slow"), images=images))
    stub.ListModels(pb.ListModelsRequest())
    return call


def test_a_second_signal_cuts_every_drain_short(models: Path) -> None:
    with supervised(models, "--workers", "2", "--drain-delay-s", "3600") as server:
        server.popen.send_signal(signal.SIGTERM)
        server.until(lambda: server.log.count("INFO draining") == 2)
        assert server.end() == 0


def test_workers_end_with_their_supervisor(models: Path) -> None:
    with supervised(models, "--workers", "2") as server:
        pids = server.pids()
        server.popen.kill()
        server.popen.wait(LIMIT_S)
        deadline = time.monotonic() + LIMIT_S
        while any(map(is_alive, pids)):
            assert time.monotonic() < deadline, "a worker outlives its supervisor"
        check_free("127.0.0.1", server.port)


def refused(*flags: str) -> tuple[int, str]:
    command = [*COMMAND, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=ENVIRONMENT, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_port_that_workers_hold_is_taken_for_others(models: Path) -> None:
    with supervised(models, "--workers", "2") as server:
        others = [refused("--models", str(models), "--port", str(server.port), "--workers", each) for each in "12"]
    for status, log in others:
        assert status == 1
        (line,) = log.splitlines()
        assert f"cannot start: cannot listen on 127.0.0.1:{server.port}: Address already in use; choose another" in line


def test_a_taken_port_is_refused_in_one_line(models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, log = refused("--models", str(models), "--port", str(port), "--workers", "2")
    assert status == 1
    assert "Address already in use" in log
    assert len(log.splitlines()) == 1


def test_what_keeps_every_worker_from_starting_ends_the_supervisor(tmp_path: Path) -> None:
    status, log = refused("--models", str(tmp_path / "nowhere"), "--port", "0", "--workers", "2")
    assert status == 1
    assert re.search(r"ERROR cannot start: models folder .*nowhere does not exist; train one", log.splitlines()[-1])
    assert "Traceback" not in log


def test_workers_that_crash_are_tried_with_growing_pauses_and_given_up(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.001)
    crash = [sys.executable, "-S", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    with pytest.raises(StartError, match="no worker comes to serve; 5 in a row ended, the last with signal SIGKILL"):
        supervisor.run(Settings(models=models, port=0, workers=2), crash)
    pauses = [record.fields["restart_in_s"] for record in caplog.records if "restart_in_s" in record.fields]
    assert sorted(set(pauses)) == [0.001, 0.002, 0.004, 0.008]


def test_a_place_whose_worker_crashes_is_tried_for_ever_while_another_serves(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(supervisor, "_MAX_BACKOFF_S", 0.01)
    # The first says that it serves; the others crash, and the ninth of them asks the supervisor to stop.
    program = f"""
import os, pathlib, signal, sys, time
folder = pathlib.Path({str(tmp_path)!r})
try:
    (folder / "first").mkdir()
except FileExistsError:
    while not (folder / "serves").exists():
        time.sleep(0.01)
    crashes = folder / "crashes"
    with crashes.open("a") as file:
        file.write("x")
    if len(crashes.read_text()) == 9:
        os.kill(os.getppid(), signal.SIGTERM)
    sys.exit(3)
print("serving", flush=True)
(folder / "serves").touch()
sys.stdin.read()
"""
    supervisor.run(Settings(models=models, port=0, workers=2), [sys.executable, "-S", "-c", program])
    assert len([record for record in caplog.records if record.message == "a worker ended"]) >= 8


def test_a_reserved_port_is_for_those_who_share_it() -> None:
    with reserve("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(ListenError, match="Address already in use"):
            reserve("127.0.0.1", port)
        with socket.socket() as worker:
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            worker.bind(("127.0.0.1", port))
            worker.listen()
            with socket.create_connection(("127.0.0.1", port), 20), worker.accept()[0]:
                pass  # the one that only holds the port takes no connection
    with reserve("127.0.0.1", port):  # at once, although connections of the last one are fading
        pass


def test_workers_do_not_go_with_envoy() -> None:
    with pytest.raises(StartError, match="--workers goes with --transport grpc"):
        from_command_line(["--workers", "2", "--transport", "envoy"])
