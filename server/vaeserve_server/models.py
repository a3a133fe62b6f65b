"""The models of one server, from the first load to the end: loaded, watched, replaced, and given back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Thread
from typing import TypeVar, cast

from vaeserve_server import trial
from vaeserve_server.bundle import Bundle
from vaeserve_server.cores import available_cores
from vaeserve_server.engine import Engine, Limits
from vaeserve_server.executor import RunPool
from vaeserve_server.graphs import CUDA, CudaOptions, Runtime
from vaeserve_server.loader import Loader, NewEngine, Policy
from vaeserve_server.models_folder import Key, ModelsFolder
from vaeserve_server.reloader import Reloader
from vaeserve_server.repository import Repository
from vaeserve_server.settings import Settings
from vaeserve_server.watchdog import Watchdog

OnServe = Callable[[Repository, Runtime], None]
"""Called on the event loop with what is served from now on."""
OnHealth = Callable[[Mapping[str, bool]], None]
"""Called on the event loop with which models can answer, each as `name` (its newest version) and as `name/version`."""

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Models:
    """What is served now. `load`, and later `stop_watching`, `close`, `end`, once each; all on the event loop."""

    def __init__(self, settings: Settings, on_serve: OnServe, on_health: OnHealth) -> None:
        self.repository: Repository | None = None
        self.pool: RunPool | None = None
        self._settings = settings
        self._on_serve = on_serve
        self._on_health = on_health
        self._watchdog: Watchdog | None = None
        self._runtime: Runtime
        self._loader: Loader | None = None
        self._reloader: Reloader | None = None
        self._retired: set[Engine] = set()

    async def load(self) -> None:
        """Load, warm and serve what the models folder has, and begin to watch it; StartError if nothing is sound."""
        self._runtime = await _in_thread(partial(new_runtime, self._settings))
        self.pool = new_pool(self._settings, self._runtime)
        if self._settings.watchdog_s:
            self._watchdog = Watchdog(self.pool, self._settings.watchdog_s)
        self._loader = new_loader(self._settings, self._runtime, self.pool)
        self._serve(await _in_thread(self._loader.first))
        self._reloader = Reloader(self._loader, self._settings.watch_s, self._serve)
        self._reloader.start()

    def reload(self) -> None:
        """Have the folder looked at now; what was refused before or does not serve is tried again."""
        if self._reloader is not None:  # else the first load is under way
            self._reloader.ask()

    async def stop_watching(self) -> None:
        """Change nothing from now on."""
        if self._reloader is not None:
            await self._reloader.close()

    def close(self) -> None:
        """Refuse what still waits for any model, and break off what still runs."""
        for engine in (*(self.repository.engines if self.repository else ()), *self._retired):
            engine.close()

    async def end(self) -> None:
        """End the threads, after the runs they have."""
        if self._watchdog is not None:
            self._watchdog.close()
        if self.pool is not None:
            await self.pool.close()

    @property
    def reloads(self) -> Mapping[str, int]:
        """How often a change was taken over (`ok`), and a version refused or the folder not seen (`failed`)."""
        return self._reloader.results if self._reloader is not None else {"ok": 0, "failed": 0}

    def refused(self) -> Sequence[Key]:
        """Return what lies in the folder, is wanted and unsound. May be called from any thread."""
        return list(self._loader.refused) if self._loader is not None else []

    def _serve(self, repository: Repository) -> None:
        before = self.repository.engines if self.repository is not None else []
        self.repository = repository
        self._on_serve(repository, self._runtime)
        for engine in repository.engines:
            engine.on_change = self._tell_health
        self._tell_health()
        for engine in set(before) - set(repository.engines):
            self._retired.add(engine)
            engine.retire(partial(self._unloaded, engine))

    def _tell_health(self) -> None:
        states: dict[str, bool] = {}
        for engine in self.repository.engines if self.repository is not None else ():  # newest first
            states.setdefault(engine.card.name, not engine.problem)
            states[engine.label] = not engine.problem
        self._on_health(states)

    def _unloaded(self, engine: Engine) -> None:
        self._retired.discard(engine)
        if self._reloader is not None:
            self._reloader.tidy()
        _log.info("model unloaded", extra={"fields": {"model": engine.label, "digest": engine.card.digest}})


async def _in_thread(work: Callable[[], _T]) -> _T:
    """Return what `work` returns, done off the loop. The process's end waits for it no more than a cancelled caller."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast("_T", result))

    def live() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    Thread(target=live, name="load", daemon=True).start()
    return await done


def new_runtime(settings: Settings) -> Runtime:
    """Return what loads graphs; DeviceError if the device that was asked for cannot be used."""
    cuda = CudaOptions(
        tf32=settings.tf32,
        nhwc=settings.nhwc,
        gpu_memory_bytes=settings.gpu_memory_bytes,
        cuda_graphs=settings.cuda_graphs,
    )
    return Runtime(settings.device, cuda, settings.precision)


def new_pool(settings: Settings, runtime: Runtime) -> RunPool:
    """Return the threads of one worker. Call on the event loop."""
    threads = settings.threads or (settings.workers if runtime.provider == CUDA else available_cores())
    return RunPool(max(1, threads // settings.workers))


def engine_maker(settings: Settings, runtime: Runtime, pool: RunPool) -> NewEngine:
    """Return what makes engines of bundles for these threads."""
    limits = Limits(
        max_rows_per_call=settings.max_rows_per_call,
        max_message_bytes=settings.max_message_bytes,
        max_batch_rows=settings.max_batch_rows,
        max_queue_rows=settings.max_queue_rows,
        batch_wait_s=settings.batch_wait_s,
        watchdog_s=settings.watchdog_s,
    )
    return lambda bundle: Engine(bundle, runtime, pool, limits)


def new_loader(settings: Settings, runtime: Runtime, pool: RunPool) -> Loader:
    """Return what loads the settings' models for these threads."""
    new_engine = engine_maker(settings, runtime, pool)

    def try_and_make(bundle: Bundle) -> Engine:
        trial.attempt(settings, bundle)
        return new_engine(bundle)

    policy = Policy(settings.versions, settings.pinned)
    return Loader(ModelsFolder(settings.models), policy, try_and_make if settings.try_first else new_engine)
