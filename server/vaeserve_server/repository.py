"""The models folder -> one engine per served version, and which of them a request means."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from vaeserve_server.bundle import NAME_PATTERN, VERSION_PATTERN, read_bundle
from vaeserve_server.engine import Engine, Limits
from vaeserve_server.errors import (
    DigestMismatchError,
    InvalidInputError,
    NoModelsError,
    NotFoundError,
    StartError,
    shown,
)
from vaeserve_server.executor import RunPool
from vaeserve_server.graphs import Runtime

_log = logging.getLogger(__name__)
_HOW_TO_PUBLISH = (
    "train one with `vaeserve-train fit`, publish it with `vaeserve-train export`, or name another --models"
)


class Repository:
    """The served engines. Immutable: a reload makes another one."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        """Take engines of distinct (name, version)."""
        self.engines = sorted(engines, key=lambda engine: (engine.card.name, -int(engine.card.version)))
        self._versions: dict[str, list[Engine]] = {}
        for engine in self.engines:
            self._versions.setdefault(engine.card.name, []).append(engine)
        # Every spelling of every served version, so that a request costs one look-up.
        self._by_request = {(e.card.name, e.card.version): e for e in self.engines}
        self._by_request |= {(name, ""): engines[0] for name, engines in self._versions.items()}
        if len(self._versions) == 1:
            self._by_request |= {("", version): engine for (_, version), engine in self._by_request.items()}

    def resolve(self, name: str, version: str, digest: str) -> Engine:
        """Return the engine that a request means; each argument may be empty.

        Raises InvalidInputError (no name, and several models), NotFoundError, DigestMismatchError.
        """
        engine = self._by_request.get((name, version))
        if engine is None:
            raise self._unresolved(name, version)
        if digest and digest != engine.card.digest:
            raise DigestMismatchError(
                f"the request is for digest {shown(digest)}; model {engine.label} has digest {engine.card.digest!r}, "
                "and latents of one model mean nothing to another",
                model=engine.label,
                digest=engine.card.digest,
            )
        return engine

    def close(self) -> None:
        """Refuse what still waits in any engine, and break off what still runs."""
        for engine in self.engines:
            engine.close()

    def _unresolved(self, name: str, version: str) -> InvalidInputError | NotFoundError:
        if not name and len(self._versions) > 1:
            return InvalidInputError(
                "model.name",
                f"the request names no model and there are several; name one of {', '.join(self._versions)}",
            )
        if name and name not in self._versions:
            return NotFoundError(f"there is no model {shown(name)}; this server has {', '.join(self._versions)}")
        served = name or next(iter(self._versions))
        versions = ", ".join(engine.card.version for engine in self._versions[served])
        return NotFoundError(
            f"model {served} has no version {shown(version)} here; this server has {versions}", model=served
        )


def load(models_dir: Path, versions: int, runtime: Runtime, pool: RunPool, limits: Limits) -> Repository:
    """Return the newest `versions` of every model, verified and warmed; StartError if any of them is unsound."""
    names = _published(models_dir)
    engines = []
    for name, published in names.items():
        for version in published[:versions]:
            engine = Engine(read_bundle(models_dir, name, version), runtime, pool, limits)
            fields = {
                "model": engine.label,
                "digest": engine.card.digest,
                "provider": engine.provider,
                "precision": runtime.precision,
                "max_rows_per_call": engine.max_rows_per_call,
            }
            _log.info("model loaded", extra={"fields": fields})
            engines.append(engine)
    return Repository(engines)


def _published(models_dir: Path) -> dict[str, list[str]]:
    """Return the versions of each model, newest first. What is not named like one is logged and left alone."""
    if not models_dir.is_dir():
        raise NoModelsError(f"models folder {models_dir} does not exist; {_HOW_TO_PUBLISH}")
    published = {}
    try:
        for name in _folders(models_dir, NAME_PATTERN.fullmatch):
            versions = _folders(models_dir / name, VERSION_PATTERN.fullmatch)
            if versions:
                published[name] = sorted(versions, key=int, reverse=True)
    except OSError as error:
        raise StartError(f"models folder {models_dir} cannot be read ({error})") from None
    if not published:
        raise NoModelsError(f"models folder {models_dir} has no model in it; {_HOW_TO_PUBLISH}")
    return published


def _folders(parent: Path, is_wanted: Callable[[str], object]) -> list[str]:
    wanted = []
    for entry in sorted(parent.iterdir()):
        if entry.name.startswith("."):  # an export that is not finished
            continue
        if is_wanted(entry.name) and entry.is_dir():
            wanted.append(entry.name)
        else:
            _log.warning("not a model, left alone", extra={"fields": {"path": entry}})
    return wanted
