"""Command-line flags made from pydantic fields, so that a flag, its check and its help are written once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any, TextIO, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from rich.console import Console

from vaeserve_training.config import ConfigError, describe


class UsageError(ConfigError):
    """A command line that is wrong by itself, whatever is on the disk."""

    exit_status = 2


class Flags(BaseSettings):
    """The flags of one subcommand. Nothing is read from the environment."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_implicit_flags="toggle",
        cli_kebab_case=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave the command line and, under it, the defaults given to `parse`."""
        return (init_settings,)


FlagsType = TypeVar("FlagsType", bound=Flags)


def parse(flags: type[FlagsType], command: str, arguments: Sequence[str], **defaults: dict[str, Any]) -> FlagsType:
    """Return the parsed flags; `defaults` are sections that the command line changes field by field.

    `--help` prints and leaves by SystemExit. Raises UsageError naming each wrong flag.
    """
    spelled = [with_hyphens(argument) for argument in arguments]
    try:
        # pydantic-settings' own options; as plain keywords they are no fields that a type checker knows.
        options: dict[str, Any] = {"_cli_parse_args": spelled, "_cli_prog_name": f"vaeserve-train {command}"}
        return flags(**options, **defaults)
    except SettingsError as error:
        raise UsageError(str(error).removeprefix("error parsing CLI: ")) from None
    except ValidationError as error:
        missing = [str(detail["loc"][-1]) for detail in error.errors() if detail["type"] == "missing"]
        if missing:
            wanted = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise UsageError(f"{wanted} is needed; vaeserve-train {command} --help says what it is") from None
        raise UsageError(describe(error)) from None


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at the moment: while a progress bar is shown, it takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr(*, quiet: bool = False) -> None:
    """Show the package's log on standard error: all of it, or with a progress bar or `quiet` only the warnings."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("vaeserve_training")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet or Console(stderr=True).is_terminal else logging.INFO)


def say(line: str) -> None:
    """Print a line of the command's result."""
    sys.stdout.write(f"{line}\n")


def with_hyphens(argument: str) -> str:
    """Let `--run_dir` stand for `--run-dir`, since messages and files spell fields with underscores."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument
