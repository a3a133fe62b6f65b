"""`vaeserve-train ladder`: from one memorised image to a VAE that generates, measured and drawn step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console

from vaeserve_training import atomic
from vaeserve_training.commands.flags import Flags, log_to_stderr, parse, say
from vaeserve_training.config import ConfigError, DataConfig
from vaeserve_training.data import load
from vaeserve_training.ladder import climb
from vaeserve_training.ladder.autoencode import OtherProcessError
from vaeserve_training.ladder.cache import CacheError
from vaeserve_training.ladder.lenet import LadderDataError
from vaeserve_training.ladder.registry import STEPS
from vaeserve_training.ladder.scale import FULL, QUICK
from vaeserve_training.ladder.workshop import WorkerError
from vaeserve_training.sources import DataError
from vaeserve_training.trainer import FitError

USER_ERRORS = (ConfigError, DataError, LadderDataError, FitError, CacheError, OtherProcessError, WorkerError, OSError)

_KEPT = "finished networks and steps are kept: the same command goes on from there"

StepNumber = Annotated[int, Field(ge=min(STEPS), le=max(STEPS))]


class LadderFlags(Flags):
    """Run the steps of the ladder and write report.html, results.json and the pictures.

    Finished steps and networks are kept in the folder and not made again: to go on after a break, run it again.
    """

    steps: tuple[StepNumber, ...] = tuple(STEPS)
    """Numbers of the steps to run, e.g. 1,5,6."""
    full: bool = False
    """All training images, convolutions and three seeds, for hours, instead of at most ten minutes."""
    out: Path = Path("runs/ladder")
    """Folder for the report, the pictures and what is kept of the work."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where networks are trained; auto takes CUDA where it works."""
    quiet: bool = False
    """Show no plan, no progress and no summary."""
    data: DataConfig = DataConfig()


def run(arguments: Sequence[str]) -> int:
    """Run what is not finished, and say where the report is."""
    flags = parse(LadderFlags, "ladder", arguments)
    log_to_stderr(quiet=flags.quiet)
    atomic.require_writable(flags.out / climb.REPORT)
    scale, data = FULL if flags.full else QUICK, load(flags.data)
    console = Console(stderr=True, quiet=flags.quiet)
    try:
        results = climb.climb(
            scale,
            data,
            flags.out,
            numbers=flags.steps,
            device=flags.device,
            show_plan=console.print,
            show_progress=not flags.quiet,
        )
    except KeyboardInterrupt:
        say(f"interrupted; {_KEPT}")
        return 130
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {_KEPT}", error.filename or str(flags.out)) from error
    for result in results:
        for claim in result.claims:
            if result.number in flags.steps and not claim.held:
                console.print(f"step {result.number}: does not hold: {claim.claim} {claim.otherwise}")
    say(f"wrote {flags.out / climb.REPORT}")
    return 0
