"""`vaeserve-train card`: the model card of a bundle as Markdown, for whoever gets the model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import CliPositionalArg

from vaeserve_training import atomic, bundle, model_card
from vaeserve_training.bundle import BundleError
from vaeserve_training.commands.flags import Flags, parse, say
from vaeserve_training.config import ConfigError

USER_ERRORS = (BundleError, ConfigError, OSError)


class CardFlags(Flags):
    """Write the model card of a published bundle: data, objective, figures with their protocols, parity, limits."""

    bundle: CliPositionalArg[Path]
    """The bundle's folder, e.g. models/mnist/1, or its model's, e.g. models/mnist, for the highest version."""
    output: Path | None = Field(default=None, validation_alias=AliasChoices("o", "output"))
    """Markdown file to write; unset: standard output."""
    licence: str = Field(default="", validation_alias=AliasChoices("licence", "license"))
    """The model's licence as an SPDX identifier, e.g. apache-2.0."""


def run(arguments: Sequence[str]) -> int:
    """Write the card, or print it."""
    flags = parse(CardFlags, "card", arguments)
    folder = bundle.resolve(flags.bundle)
    try:
        text = model_card.markdown(bundle.read_card(folder), licence=flags.licence)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{folder / bundle.CARD_FILE}: {error}") from None
    if flags.output is None:
        sys.stdout.write(text)
    else:
        atomic.write_file(flags.output, text.encode())
        say(f"wrote {flags.output}")
    return 0
