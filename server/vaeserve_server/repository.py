"""One engine per served version, and which of them a request means."""

from __future__ import annotations

from collections.abc import Iterable

from vaeserve_server.engine import Engine
from vaeserve_server.errors import DigestMismatchError, InvalidInputError, NotFoundError, shown


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
