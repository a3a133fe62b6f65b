"""`vaeserve-server token`: makes, lists and removes the tokens of a file. A token is shown once, when it is made.

A running server sees the file change and takes it over; files are replaced whole, so that it never sees half of one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from vaeserve_server import tokens
from vaeserve_server.errors import StartError, TokensError, shown
from vaeserve_server.tokens import TokenFile

_OK, _FAILED, _MISUSED = 0, 1, 2
_NEW_FILE_MODE = 0o600
_ABOUT_A_MODEL = "GetModel"
_ASK_FIRST = {"Encode", "Decode", "Sample"}
_MAX_DAYS = 36500


def main(arguments: Sequence[str]) -> int:
    """Run one command; return 0, 1 if the file cannot be used, or 2 if the command line is wrong."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except StartError as error:
        return _complain(str(error).removeprefix("--tokens "), _FAILED)
    except OSError as error:
        return _complain(f"{error.filename or options.file}: {error.strerror}", _FAILED)
    return status


def _add(options: argparse.Namespace) -> int:
    rpcs = tuple(dict.fromkeys(options.rpc))
    if _ASK_FIRST & set(rpcs) and not options.only:
        rpcs = tuple(dict.fromkeys([*rpcs, _ABOUT_A_MODEL]))
    expires = None if options.days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=options.days)
    try:
        secret, token = tokens.make(options.name, rpcs, expires)
    except ValidationError as error:
        return _complain(tokens.problem(error), _MISUSED)
    with _exclusive(options.file):
        there = tokens.read(options.file).tokens if options.file.exists() else ()
        if any(other.name == token.name for other in there):
            return _complain(
                f"{options.file} has a token {token.name} already; remove it first, or choose another name to have "
                "both valid while callers change over",
                _FAILED,
            )
        _write(options.file, TokenFile(tokens=(*there, token)))
    until = f"until {expires:%Y-%m-%d %H:%M} UTC" if expires else "until it is removed"
    sys.stderr.write(
        f"{token.name}, for {', '.join(token.rpcs)}, {until}. {options.file} holds a hash; the token itself is shown "
        "only now:\n"
    )
    sys.stdout.write(f"{secret}\n")
    return _OK


def _list(options: argparse.Namespace) -> int:
    now = datetime.now(UTC)
    for token in tokens.read(options.file).tokens:
        expires = "never" if token.expires is None else f"{token.expires:%Y-%m-%d %H:%M} UTC"
        word = "expired" if token.expires and token.expires <= now else "expires"
        sys.stdout.write(f"{token.name}  {', '.join(token.rpcs)}  {word} {expires}\n")
    return _OK


def _remove(options: argparse.Namespace) -> int:
    with _exclusive(options.file):
        there = tokens.read(options.file).tokens
        left = tuple(token for token in there if token.name != options.name)
        if len(left) == len(there):
            return _complain(f"{options.file} has no token {shown(options.name)}", _FAILED)
        _write(options.file, TokenFile(tokens=left))
    return _OK


def _write(path: Path, file: TokenFile) -> None:
    """Put `file` in the place of what is there, whole, with the rights that were there."""
    target = path.resolve()  # not in the place of a link
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(file.model_dump_json(indent=2, exclude_none=True) + "\n")
            stream.flush()
            os.fsync(descriptor)
            if target.exists():
                before = target.stat()
                os.fchmod(descriptor, before.st_mode & 0o777)
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
            else:
                os.fchmod(descriptor, _NEW_FILE_MODE)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Let no other such command change the file meanwhile."""
    folder = path.resolve().parent
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise TokensError(path, f"its folder cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _parser() -> argparse.ArgumentParser:
    words = "Make, list and remove the tokens that `vaeserve-server --tokens FILE` asks callers for."
    parser = argparse.ArgumentParser(prog="vaeserve-server token", description=words)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = _command(commands, "add", _add, "Make a token. It goes to standard output, once; the file gets a hash of it.")
    add.add_argument("name", help="of the caller, for logs and for removing it; no secret")
    known = ", ".join(tokens.SHORT_NAMES)
    add.add_argument(
        "--rpc",
        action="append",
        required=True,
        metavar="RPC",
        help=f"what it is for, repeated: {known}, package.Service/Method, package.Service/*, or * for everything",
    )
    add.add_argument("--only", action="store_true", help="no GetModel, which the SDK asks before it sends arrays")
    add.add_argument("--days", type=_days, help="how long it is valid (default: until it is removed)")
    _command(commands, "list", _list, "Show the names, what they are for, and until when; no secret.")
    remove = _command(commands, "remove", _remove, "Remove a token; running servers refuse it a second or two later.")
    remove.add_argument("name")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, words: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    command: argparse.ArgumentParser = commands.add_parser(name, help=words, description=words)
    command.set_defaults(run=run)
    command.add_argument("-o", "--file", type=Path, required=True, help="the file of tokens, made if it is not there")
    return command


def _days(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (days := float(text)) <= _MAX_DAYS:
            return days
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of days above 0")


def _complain(problem: str, status: int) -> int:
    sys.stderr.write(f"vaeserve-server token: {problem}\n")
    return status
