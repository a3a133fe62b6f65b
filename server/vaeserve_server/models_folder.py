"""What lies in the models folder, at a glance: names, versions, and whether a version has changed since the last look.

A look lists folders and asks for the state of a few files; it opens none. It is repeated by the clock rather than
called by inotify, which knows nothing of what another machine does to a shared folder, nor of a mount under this one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vaeserve_server.bundle import CARD_FILE, NAME_PATTERN, VERSION_PATTERN
from vaeserve_server.errors import NoModelsError, StartError

_log = logging.getLogger(__name__)
_HOW_TO_PUBLISH = (
    "train one with `vaeserve-train fit`, publish it with `vaeserve-train export`, or name another --models"
)


class Key(NamedTuple):
    """One version of one model: models/<name>/<version>."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Each file of a version, links followed: name, inode, size, time of change. Another one means another content."""


class ModelsFolder:
    """The folder at `path`. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left_alone: set[Path] = set()

    def published(self) -> dict[str, list[Key]]:
        """Return the versions of each model, newest first; NoModelsError, or StartError if it cannot be read.

        What is not named like one is logged once and left alone.
        """
        if not self.path.is_dir():
            raise NoModelsError(f"models folder {self.path} does not exist; {_HOW_TO_PUBLISH}")
        published = {}
        try:
            for name in self._folders(self.path, NAME_PATTERN.fullmatch):
                versions = self._folders(self.path / name, VERSION_PATTERN.fullmatch)
                if versions:
                    published[name] = [Key(name, version) for version in sorted(versions, key=int, reverse=True)]
        except OSError as error:
            raise StartError(f"models folder {self.path} cannot be read ({error})") from None
        if not published:
            raise NoModelsError(f"models folder {self.path} has no model in it; {self._hint()}")
        return published

    def fingerprint(self, key: Key) -> Fingerprint:
        """Return the state of a version's files; empty for what cannot be looked at, which reading it will tell."""
        try:
            return tuple(sorted(_state(entry) for entry in (self.path / key.name / key.version).iterdir()))
        except OSError:
            return ()

    def _hint(self) -> str:
        """Return what to do: people name the folder of one model, or of one version of it, and mean the one above."""
        levels = {self.path: "../..", **dict.fromkeys(self.path.iterdir(), "..")}
        for folder, above in levels.items():
            if VERSION_PATTERN.fullmatch(folder.resolve().name) and (folder / CARD_FILE).is_file():
                meant = (self.path / above).resolve()
                return f"it is a model's own folder: name the one that it lies in, --models {meant}"
        return _HOW_TO_PUBLISH

    def _folders(self, parent: Path, is_wanted: Callable[[str], object]) -> list[str]:
        wanted = []
        for entry in sorted(parent.iterdir()):
            if entry.name.startswith("."):  # an export that is not finished
                continue
            if is_wanted(entry.name) and entry.is_dir():
                wanted.append(entry.name)
            elif entry not in self._left_alone:
                self._left_alone.add(entry)
                _log.warning("not a model, left alone", extra={"fields": {"path": entry}})
        return wanted


def _state(entry: Path) -> tuple[str, int, int, int]:
    status = entry.stat()
    return entry.name, status.st_ino, status.st_size, status.st_mtime_ns
