"""Servers behind one client are restarted one after the other, under load: no call fails."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from bundles import ENCODER, run_directly, write_bundle
from processes import Process, server_process
from vaeserve import AsyncClient, Client

IMAGE, LATENT = (1, 4, 4), (3,)
LIMIT_S = 60.0
CALLS_BETWEEN = 100


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_bundle(folder, image_shape=IMAGE, latent_shape=LATENT)
    return folder


class Load:
    """Both clients, calling without a pause; every answer is compared with the graph's own."""

    def __init__(self, models: Path, target: str) -> None:
        self._images = np.random.default_rng(1).random((5, *IMAGE), np.float32)
        self._expected = run_directly(models / "mnist" / "1", ENCODER, self._images)[0]
        self._target = target
        self._stop = threading.Event()
        self.answered = 0
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._block), threading.Thread(target=asyncio.run, args=[self._run()])]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(LIMIT_S)

    def wait_for_more(self) -> None:
        """Wait until so many more calls were answered, or one has failed."""
        enough = self.answered + CALLS_BETWEEN
        deadline = time.monotonic() + LIMIT_S
        while self.answered < enough and not self.failures:
            assert time.monotonic() < deadline, "the calls do not go on"
            self._stop.wait(0.01)

    def _take(self, mean: np.ndarray) -> None:
        np.testing.assert_allclose(mean, self._expected, atol=1e-5)
        self.answered += 1

    def _block(self) -> None:
        with Client(self._target) as client:
            while not self._stop.is_set():
                try:
                    self._take(client.encode(self._images).mean)
                except BaseException as error:  # noqa: BLE001 - whatever it is, the test is to show it
                    self.failures.append(error)
                    return

    async def _run(self) -> None:
        async with AsyncClient(self._target) as client:
            await asyncio.gather(*(self._await(client) for _ in range(4)))

    async def _await(self, client: AsyncClient) -> None:
        while not self._stop.is_set():
            try:
                self._take((await client.encode(self._images)).mean)
            except BaseException as error:  # noqa: BLE001 - as above
                self.failures.append(error)
                return


def test_a_rolling_restart_fails_no_call(models: Path) -> None:
    with ExitStack() as last:

        def start(port: int) -> Process:
            return last.enter_context(server_process(models, port=port))

        servers = [start(0), start(0)]
        ports = [int(server.target.rpartition(":")[2]) for server in servers]
        load = Load(models, "ipv4:" + ",".join(server.target for server in servers))
        with load.running():
            for which in (0, 1):
                load.wait_for_more()
                servers[which].signal(signal.SIGTERM)
                status, log = servers[which].end()
                assert (status, "Traceback" in log) == (0, False), log
                load.wait_for_more()
                servers[which] = start(ports[which])
            load.wait_for_more()
        assert not load.failures, repr(load.failures)
