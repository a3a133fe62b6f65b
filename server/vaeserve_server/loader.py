"""The models folder -> the engines to serve: verified, loaded and warmed before anybody calls them.

What is unsound is refused and left alone until it changes, and what is served goes on being served: a damaged copy of
it, a folder that has become unreadable or empty, take nothing away that is in memory and works.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from vaeserve_server.bundle import Bundle, read_bundle
from vaeserve_server.engine import Engine
from vaeserve_server.errors import StartError
from vaeserve_server.models_folder import Fingerprint, Key, ModelsFolder
from vaeserve_server.repository import Repository

NewEngine = Callable[[Bundle], Engine]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """Which versions to serve: of each model the `newest` sound ones, and besides them those that are `pinned`."""

    newest: int
    pinned: frozenset[Key] = frozenset()


@dataclass(frozen=True)
class _Loaded:
    fingerprint: Fingerprint
    engine: Engine


@dataclass(frozen=True)
class _Refusal:
    fingerprint: Fingerprint
    error: StartError


class Loader:
    """Loads what the folder has and the policy wants. For one thread at a time, and not the event loop's."""

    def __init__(self, folder: ModelsFolder, policy: Policy, new_engine: NewEngine) -> None:
        self.refusals = 0
        """How often a version was refused, all in all."""
        self._folder = folder
        self._policy = policy
        self._new_engine = new_engine
        self._loaded: dict[Key, _Loaded] = {}
        self._refused: dict[Key, _Refusal] = {}
        self._looked: dict[Key, Fingerprint] = {}  # what the last look saw of versions that it did not load
        self._missed: frozenset[Key] = frozenset()

    @property
    def refused(self) -> dict[Key, str]:
        """What lies in the folder, is wanted and unsound, and why. May be read from any thread."""
        return {key: str(refusal.error) for key, refusal in self._refused.copy().items()}

    def first(self) -> Repository:
        """Return what is to be served; StartError if nothing can be."""
        repository = self._step(again=True)
        if repository is None:
            first, *others = [refusal.error for refusal in self._refused.values()]
            raise StartError(f"{first}; {len(others)} other versions are refused too") if others else first
        for key, refusal in self._refused.items():
            _tell(key, refusal)
        return repository

    def next(self, *, again: bool = False) -> Repository | None:
        """Return what is to be served from now on; None if that is what already is.

        A version is read when two looks on end saw the same of it: it may be a copy under way. `again`: read at once,
        and also what was refused before or is not serving now. StartError if the folder cannot be read or is empty.
        """
        before = self._refused.copy()
        repository = self._step(again=again)
        for key, refusal in self._refused.items():
            if before.get(key) is not refusal:
                _tell(key, refusal)
        return repository

    def _step(self, *, again: bool) -> Repository | None:
        published = self._folder.published()
        present = {key for versions in published.values() for key in versions}
        self._tell_missing(self._policy.pinned - present)
        for memory in (self._refused, self._looked):
            for key in memory.keys() - present:
                del memory[key]
        wanted: dict[Key, _Loaded] = {}
        for versions in published.values():
            newest = 0
            for key in versions:
                if newest < self._policy.newest or key in self._policy.pinned:
                    loaded = self._load(key, again=again)
                    if loaded is not None:
                        wanted[key] = loaded
                        newest += 1
                else:
                    self._refused.pop(key, None)
        if wanted == self._loaded:
            return None
        self._loaded = wanted
        return Repository(loaded.engine for loaded in wanted.values())

    def _load(self, key: Key, *, again: bool) -> _Loaded | None:
        """Return one version as it lies there, or as it is served if it is unsound or just being copied."""
        loaded, refusal = self._loaded.get(key), self._refused.get(key)
        fingerprint = self._folder.fingerprint(key)
        if loaded is not None and loaded.fingerprint == fingerprint and not (again and loaded.engine.problem):
            self._refused.pop(key, None)
            return loaded
        if refusal is not None and refusal.fingerprint == fingerprint and not again:
            return loaded
        if not again and self._looked.get(key) != fingerprint:
            self._looked[key] = fingerprint
            return loaded
        try:
            engine = self._new_engine(read_bundle(self._folder.path, key.name, key.version))
        except StartError as error:
            self._refuse(key, fingerprint, error)
            return loaded
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one version, the others are served
            _log.exception("loading failed", extra={"fields": {"model": str(key)}})
            self._refuse(key, fingerprint, StartError(f"{key} cannot be loaded ({type(error).__name__}: {error})"))
            return loaded
        self._refused.pop(key, None)
        fields = {
            "model": engine.label,
            "digest": engine.card.digest,
            "provider": engine.provider,
            "precision": engine.precision,
            "max_rows_per_call": engine.max_rows_per_call,
        }
        _log.info("model loaded", extra={"fields": fields})
        return _Loaded(fingerprint, engine)

    def _refuse(self, key: Key, fingerprint: Fingerprint, error: StartError) -> None:
        self.refusals += 1
        self._refused[key] = _Refusal(fingerprint, error)

    def _tell_missing(self, missing: frozenset[Key]) -> None:
        for key in missing - self._missed:
            _log.warning("a pinned version is not in the models folder", extra={"fields": {"model": str(key)}})
        self._missed = missing


def _tell(key: Key, refusal: _Refusal) -> None:
    _log.error("model refused", extra={"fields": {"model": str(key), "reason": refusal.error}})
