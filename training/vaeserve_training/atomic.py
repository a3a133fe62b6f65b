"""Write a file or a folder so that a reader sees all of it or none of it.

Caches, checkpoints and bundles are read by programs that trust what they find. So nothing is written under its final
name: it is written beside it, flushed to the disk, and renamed. A failure or a kill leaves the old state; whatever is
left of the new one has a name that begins with a dot, which no reader looks at.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Write `content` as `path`, replacing an existing file in one step. Folders on the way are made.

    Raises OSError (no space left, read-only, ...) after removing what was written of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _name_beside(path)
    try:
        with naming(path):
            _write_synced(temporary, content)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def publish_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (name -> content) as the new folder `path`. Folders on the way are made.

    Raises FileExistsError if `path` exists, and OSError (no space left, ...) after removing what was written, the
    folders on the way included.
    """
    made = _make_parents(path)
    temporary = _name_beside(path)
    try:
        with naming(path):
            temporary.mkdir()
        for name, content in files.items():
            with naming(path / name):
                _write_synced(temporary / name, content)
        _sync_folder(temporary)
        _rename_to_new(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in reversed(made):
            _remove_if_empty(folder)
        raise
    _sync_folder(path.parent)


def require_writable(path: Path) -> None:
    """Raise OSError naming `path` unless a file can be made where it is to be, so that work is not done for nothing."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    probe = _name_beside(folder / "probe")
    with naming(path):
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let every OSError of the block name `path`: that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _rename_to_new(temporary: Path, path: Path) -> None:
    # A rename onto an empty folder would replace it. One onto a folder with files fails by itself, so that of two
    # writers who both come this far the second does not win.
    if path.exists():
        raise FileExistsError(f"{path} exists; what was published is never changed")
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(f"{path} exists; what was published is never changed") from error
        raise


def _name_beside(path: Path) -> Path:
    """Return an unused name in the same folder, so on the same file system: only there is a rename atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries: a rename is only durable once the folder that holds the name is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above `path` and return those that were not there, outermost first."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _remove_if_empty(folder: Path) -> None:
    # Another writer may have put something there meanwhile, which is no error of ours.
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
