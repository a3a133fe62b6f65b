"""The token that a client shows with each call: where it comes from, and over which connections it may go.

No error here repeats it: what goes wrong with a secret ends in logs like everything else.
"""

from __future__ import annotations

import os
from pathlib import Path

from vaeserve.errors import InvalidArgument, invalid

VARIABLE = "VAESERVE_TOKEN"
FILE_VARIABLE = "VAESERVE_TOKEN_FILE"


class Token:
    """A token, read again when the file that it stands in has changed."""

    def __init__(self, source: str, text: str, file: Path | None = None) -> None:
        """Hold a token and where it comes from, in words. Make it by `find`."""
        self.source = source
        self._file = file
        self._read_at = _changed_at(file)
        self._header = _header(text, source)

    def header(self) -> str:
        """Return what to send as `authorization`. While a new file cannot be read, the token of the old one."""
        if self._file is not None and (changed_at := _changed_at(self._file)) not in (self._read_at, None):
            try:
                self._header = _header(self._file.read_text(), self.source)
            except (OSError, UnicodeDecodeError, InvalidArgument):
                return self._header
            self._read_at = changed_at
        return self._header

    def check_connection(self, *, encrypted: bool, local: bool, insecure: bool, target: str) -> None:
        """Raise InvalidArgument where the token would cross a network for everybody there to read."""
        if not (encrypted or local or insecure):
            raise invalid(
                "token",
                f"the token ({self.source}) would cross the network to {target} unencrypted; give tls, or insecure "
                "where something else encrypts",
            )


def find(given: str | Path | None) -> Token | None:
    """Return the token that was given, else the environment's; None if there is none.

    A Path is a file that holds it. OSError names a file that cannot be read.
    """
    if isinstance(given, Path):
        return _from_file(given, str(given))
    if given is not None:
        return Token("token", given) if given else None
    if text := os.environ.get(VARIABLE):
        return Token(VARIABLE, text)
    if name := os.environ.get(FILE_VARIABLE):
        return _from_file(Path(name), f"{FILE_VARIABLE}, {name}")
    return None


def _from_file(file: Path, source: str) -> Token:
    try:
        return Token(source, file.read_text(), file)
    except UnicodeDecodeError:
        raise invalid("token", f"the token ({source}) is no text") from None


def _header(text: str, source: str) -> str:
    token = text.strip()
    # grpc would refuse it too, and repeat it in the error.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise invalid("token", f"the token ({source}) is empty, or not one word of printable ASCII")
    return f"Bearer {token}"


def _changed_at(file: Path | None) -> tuple[int, ...] | None:
    try:
        found = file.stat() if file else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ino, found.st_size) if found else None
