"""`vaeserve-train data`: fetch a data set and show what training would see."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vaeserve_training.commands.flags import Flags, log_to_stderr, parse, say
from vaeserve_training.config import ConfigError, DataConfig
from vaeserve_training.data import load, summary
from vaeserve_training.sources import DataError

USER_ERRORS = (ConfigError, DataError, OSError)


class DataFlags(Flags):
    """Fetch and check a data set, and say what is in it."""

    data: DataConfig = DataConfig()


def run(arguments: Sequence[str]) -> int:
    """Load the data set and print its summary as JSON."""
    flags = parse(DataFlags, "data", arguments)
    log_to_stderr()
    say(json.dumps(summary(load(flags.data)), indent=2))
    return 0
