"""Several server processes on one port, started, watched and ended together: --workers.

The kernel spreads connections over them (SO_REUSEPORT). A worker listens only once it can answer, and stops listening
when it ends or dies, so that on the one port there is one health: SERVING, or nobody there. Python's lock is one per
process, and so is a GPU's queue of kernels: workers pay where the calls themselves are the load, on a CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator, Sequence

from vaeserve_server.addresses import reserve
from vaeserve_server.app import watch_signals
from vaeserve_server.errors import StartError
from vaeserve_server.metrics_http import MetricsEndpoint
from vaeserve_server.metrics_merge import MergedPages
from vaeserve_server.settings import Settings
from vaeserve_server.worker import FAILED

_log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 30.0
# A worker that lived this long died of something new.
_STEADY_S = 60.0
_START_ATTEMPTS = 5
# Of each worker: for the supervisor alone to read.
_OWN_METRICS = {"metrics_host": "127.0.0.1", "metrics_port": 0}
# Beyond a drain's own limits, until a worker that does not end is killed.
_PATIENCE_S = 15.0


def run(settings: Settings, command: Sequence[str] = (sys.executable, "-m", "vaeserve_server.worker")) -> int:
    """Serve with `settings.workers` processes until a signal, then drain them all; return the exit status.

    StartError if the port is taken or no worker ever comes to serve.
    """
    with contextlib.closing(reserve(settings.host, settings.port)) as reserved:
        return asyncio.run(_Supervisor(settings, reserved, command).live())


class _Supervisor:
    def __init__(self, settings: Settings, reserved: socket.socket, command: Sequence[str]) -> None:
        self._settings = settings.model_copy(update={"port": reserved.getsockname()[1], **_OWN_METRICS})
        self._metrics_address = settings.metrics_host, settings.metrics_port
        self._command = command
        self._processes: set[Process] = set()
        self._serving: set[Process] = set()
        self._stopping = asyncio.Event()
        self._metrics_urls: dict[int, str] = {}  # of the workers that serve now, by their place
        self._ready: set[int] = set()  # the places whose worker has come to serve, once at least
        self._failure: StartError | None = None
        self._clean = True

    async def live(self) -> int:
        """Keep the workers until told to stop; return the exit status."""
        watch_signals(self._on_signal, self._on_reload)
        with self._one_page():
            await asyncio.gather(*(self._keep(place) for place in range(self._settings.workers)))
        if self._failure is not None:
            raise self._failure
        _log.info("all workers stopped")
        return 0 if self._clean else 1

    @contextlib.contextmanager
    def _one_page(self) -> Iterator[None]:
        """Serve the metrics of all workers on the address that the settings name."""
        if not self._settings.metrics:
            yield
            return
        page = MetricsEndpoint(*self._metrics_address, MergedPages(self._metrics_urls.copy).text)
        _log.info("metrics", extra={"fields": {"url": page.url}})
        try:
            yield
        finally:
            page.close()

    def _on_signal(self) -> None:
        self._stopping.set()
        for process in self._processes:
            _signal(process, signal.SIGTERM)

    def _on_reload(self) -> None:
        """Tell the workers that can hear it; those that do not serve yet read the folder anyway."""
        for process in self._serving:
            _signal(process, signal.SIGHUP)

    async def _keep(self, place: int) -> None:
        """Have a worker in one place, again and again, until told to stop."""
        loop = asyncio.get_running_loop()
        backoff_s, attempts = _FIRST_BACKOFF_S, 0
        while not self._stopping.is_set():
            started = loop.time()
            attempts += 1
            process, status = await self._live_once(place)
            if self._stopping.is_set():
                self._clean &= status in (0, -signal.SIGTERM)  # the signal itself, if no handler was there yet
                return
            if not self._ready and attempts >= _START_ATTEMPTS:
                self._give_up(f"no worker comes to serve; {attempts} in a row ended, the last with {_words(status)}")
                return
            if loop.time() - started >= _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            fields = {"pid": process.pid, "status": _words(status), "restart_in_s": backoff_s}
            _log.error("a worker ended", extra={"fields": fields})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _live_once(self, place: int) -> tuple[Process, int]:
        """Start a worker and wait for its end; return it and its exit status."""
        # In a session of its own, so that a Ctrl-C at the terminal reaches it once, through here.
        process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, start_new_session=True)
        assert process.stdin is not None
        assert process.stdout is not None
        self._processes.add(process)
        try:
            if self._stopping.is_set():
                _signal(process, signal.SIGTERM)
            process.stdin.write(self._settings.model_dump_json().encode() + b"\n")  # and it stays open
            self._note(place, process, (await process.stdout.readline()).decode().rstrip("\n"))
            if url := (await process.stdout.readline()).decode().rstrip("\n"):
                self._metrics_urls[place] = url
            return process, await self._end_of(process)
        finally:
            self._metrics_urls.pop(place, None)
            self._processes.discard(process)
            self._serving.discard(process)
            process.stdin.close()

    def _note(self, place: int, process: Process, line: str) -> None:
        """Take in a worker's first line; it is empty if the worker died."""
        if line.startswith(FAILED):
            reason = line.removeprefix(FAILED)
            _log.error("a worker cannot start", extra={"fields": {"pid": process.pid, "reason": reason}})
            if not self._ready:
                self._give_up(reason)
        elif line:
            _log.info("worker ready", extra={"fields": {"pid": process.pid}})
            self._serving.add(process)
            if place not in self._ready:
                self._ready.add(place)
                if len(self._ready) == self._settings.workers:
                    sys.stdout.write(f"{line}, {self._settings.workers} workers\n")
                    sys.stdout.flush()

    async def _end_of(self, process: Process) -> int:
        """Wait for a worker's end, for ever until told to stop, and then as long as a drain may take."""
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        patience_s = self._settings.drain_delay_s + self._settings.drain_s + _PATIENCE_S
        done, _ = await asyncio.wait({ended}, timeout=patience_s)
        if not done:
            _log.error("a worker does not end, killing it", extra={"fields": {"pid": process.pid}})
            _signal(process, signal.SIGKILL)
        return await ended

    def _give_up(self, reason: str) -> None:
        self._failure = self._failure or StartError(reason)
        self._on_signal()


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and its own task will see that
        process.send_signal(number)


def _words(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
