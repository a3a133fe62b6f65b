"""The server's life: listen, load and verify, warm, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from google.protobuf.runtime_version import VersionError

from vaeserve_server import connections
from vaeserve_server.addresses import address
from vaeserve_server.calls import Calls, Method, native_methods
from vaeserve_server.credentials import Credentials
from vaeserve_server.errors import StartError
from vaeserve_server.health import Health
from vaeserve_server.metrics import Metrics
from vaeserve_server.metrics_http import MetricsEndpoint
from vaeserve_server.models import Models
from vaeserve_server.service import VaeService
from vaeserve_server.settings import Settings
from vaeserve_server.stats import MethodStats
from vaeserve_server.transport_grpc import GrpcTransport

if TYPE_CHECKING:
    from vaeserve_server.tracing import CallTracer

_log = logging.getLogger(__name__)


class Transport(Protocol):
    """What carries the calls. Each method is called once, in this order."""

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port; ListenError if it cannot be had."""

    async def renew_tls(self) -> None:
        """Show new connections the certificate that is in the files now. For once, any number of times."""

    def stats(self) -> list[MethodStats]:
        """Return the counts of calls that it refused by itself. Once started, at any time and in other threads."""

    def refuse(self) -> None:
        """Take no more calls, and send clients elsewhere; what is in flight goes on."""

    async def close(self) -> None:
        """Give answers a moment to be sent, and cut off what is left."""


NewTransport = Callable[[Calls, Health, int], Transport]
"""Makes a transport for these calls, that health service, and messages of at most so many bytes."""

WatchSignals = Callable[[Callable[[], None], Callable[[], None]], None]
"""Is given what to call on the event loop at each signal to stop, and at each to look at the models folder."""


class GivenUpError(Exception):
    """The server was asked to stop before it served."""


class Server:
    """One server in the running event loop. `port` is the one listened on, once started."""

    def __init__(self, settings: Settings, new_transport: NewTransport | None = None) -> None:
        """Make it; StartError if the settings want what is not installed."""
        self.settings = settings
        self.port = 0
        self._service = VaeService()
        methods = native_methods(self._service)
        if settings.oip:
            methods += _oip_methods(self._service, lambda name: self._health.is_serving(name))  # noqa: PLW0108 - not yet
        self._credentials = Credentials(settings)
        self._calls = Calls(methods, self._credentials.access, settings.max_calls)
        self._health = Health(self._calls.services)
        self._tracer: CallTracer | None = None
        self._metrics: MetricsEndpoint | None = None
        if new_transport is None:
            new_transport = partial(
                GrpcTransport,
                limits=connections.limits_of(settings),
                share_port=settings.workers > 1,
                tls=self._credentials.tls,
            )
        self._transport = new_transport(self._calls, self._health, settings.max_message_bytes)
        self.models = Models(settings, self._service.open, self._health.set_models)
        self._hurry = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None
        self._given_up = False

    async def start(self) -> None:
        """Listen, load and warm the models, then let health say SERVING. StartError if one of it cannot be done.

        GivenUpError after `give_up_start`.
        """
        await self._credentials.load()
        # The port first: that it is taken is known at once, and who calls early hears that the server is loading.
        # One of several workers listens last: while others can answer nobody need hear that.
        listens_last = self.settings.workers > 1
        if not listens_last:
            await self._listen()
        try:
            self._watch()
            await self._load()
            if listens_last:
                await self._listen()
        except BaseException:
            self.hurry()
            await self.stop()
            raise
        if self._metrics is not None and self.settings.workers == 1:  # else there is one page for all
            _log.info("metrics", extra={"fields": {"url": self._metrics.url}})
        self._credentials.say_who_may_call()
        self._health.set_serving(True)

    async def stop(self) -> None:
        """Drain: say NOT_SERVING, serve on for the delay, take no more calls, let those in flight finish."""
        self._health.set_serving(False)
        watch_over = asyncio.create_task(self.models.stop_watching())
        await self._unless_hurried(asyncio.sleep(self.settings.drain_delay_s), None)
        self._service.drain()
        self._transport.refuse()
        await self._unless_hurried(self._calls.wait_idle(), self.settings.drain_s)
        self.models.close()
        self._health.close()
        await self._transport.close()
        self._credentials.close()
        await watch_over
        await self.models.end()
        for last in (self._metrics, self._tracer):  # so that they tell of the drain as well
            if last is not None:
                await asyncio.to_thread(last.close)

    def give_up_start(self) -> None:
        """Do not wait for the models any longer: loading them can take minutes, or for ever. Later it does nothing."""
        self._given_up = True
        if self._loading is not None:
            self._loading.cancel()

    def reload(self) -> None:
        """Look at the models folder now, and try again what was refused."""
        _log.info("reload asked for")
        self.models.reload()

    def hurry(self) -> None:
        """Cut a drain short."""
        self._hurry.set()

    def ready_line(self) -> str:
        """Return what is served where, for people and scripts that wait for it."""
        engines = self.models.repository.engines if self.models.repository else []
        provider = engines[0].provider if engines else ""
        models = ", ".join(engine.label for engine in engines)
        return f"serving {models} on {address(self.settings.host, self.port)} ({provider})"

    async def _listen(self) -> None:
        self.port = await self._transport.start(self.settings.host, self.settings.port)
        self._credentials.watch(self._transport.renew_tls)

    async def _unless_hurried(self, waiting: Coroutine[Any, Any, None], limit_s: float | None) -> None:
        tasks = {asyncio.create_task(waiting), asyncio.create_task(self._hurry.wait())}
        await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    @property
    def metrics_url(self) -> str:
        """Where the metrics are, once started; empty if there are none."""
        return self._metrics.url if self._metrics else ""

    def _watch(self) -> None:
        settings = self.settings
        if settings.metrics:
            metrics = Metrics(self._service, lambda: self._calls.stats() + self._transport.stats(), self.models)
            self._metrics = MetricsEndpoint(settings.metrics_host, settings.metrics_port, metrics.text)
        if settings.traces:
            self._calls.tracer = self._tracer = _new_tracer()

    async def _load(self) -> None:
        self._loading = asyncio.create_task(self.models.load())
        if self._given_up:
            self._loading.cancel()
        try:
            await self._loading
        except asyncio.CancelledError:
            if self._given_up:
                raise GivenUpError from None
            raise


def _oip_methods(service: VaeService, is_serving: Callable[[str], bool]) -> list[Method]:
    try:
        from vaeserve_server import oip  # noqa: PLC0415 - needs an extra
    except (ModuleNotFoundError, RuntimeError) as error:
        missing = error.__cause__ or error  # tritonclient makes the one of the other
        root = ((isinstance(missing, ModuleNotFoundError) and missing.name) or "vaeserve").partition(".")[0]
        if root.startswith("vaeserve"):
            raise
        raise StartError(f'--oip needs {root}; pip install "vaeserve[oip]"') from None
    except VersionError:  # generated code that is newer than the protobuf under it
        raise StartError('--oip needs a newer protobuf; pip install --upgrade "vaeserve[oip]"') from None
    return oip.methods(service, is_serving)


def _new_tracer() -> CallTracer:
    try:
        from vaeserve_server.tracing import CallTracer  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise StartError(f'--traces needs {error.name}; pip install "vaeserve[otel]"') from None
    return CallTracer()


async def serve(server: Server, watch_signals: WatchSignals) -> None:
    """Live the server's life."""
    asked_to_stop = asyncio.Event()

    def on_signal() -> None:
        if asked_to_stop.is_set():
            server.hurry()
        asked_to_stop.set()
        server.give_up_start()

    watch_signals(on_signal, server.reload)
    try:
        await server.start()
    except GivenUpError:
        _log.info("stopped before it served")
        return
    sys.stdout.write(server.ready_line() + "\n")
    sys.stdout.flush()
    await asked_to_stop.wait()
    limits = {"delay_s": server.settings.drain_delay_s, "limit_s": server.settings.drain_s}
    _log.info("draining", extra={"fields": limits})
    await server.stop()
    _log.info("stopped")


def watch_signals(on_stop: Callable[[], None], on_reload: Callable[[], None]) -> None:
    """Have `on_stop` called on the running event loop at each SIGTERM and SIGINT, `on_reload` at each SIGHUP."""
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_reload)
