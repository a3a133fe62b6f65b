"""`vaeserve-train fit`: every field of the training configuration is a flag; presets and files give the defaults."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vaeserve_training import checkpoint
from vaeserve_training.board import BoardError
from vaeserve_training.checkpoint import CheckpointError
from vaeserve_training.commands.flags import Flags, UsageError, log_to_stderr, parse, say, with_hyphens
from vaeserve_training.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimiserConfig,
    RunConfig,
    TrainConfig,
    preset,
)
from vaeserve_training.fit import fit
from vaeserve_training.sources import DataError
from vaeserve_training.trainer import FitError

USER_ERRORS = (ConfigError, DataError, FitError, CheckpointError, BoardError, OSError)


class FitFlags(Flags):
    """Train a model.

    A flag outweighs the file of --config, which outweighs the --preset. The defaults shown are the preset mnist's.
    --resume alone takes the configuration of the run that it goes on with.
    """

    run_dir: Path
    """Folder that the run's checkpoints and metrics are written to."""
    preset: Annotated[str | None, Field(description=f"Configuration to start from: {', '.join(PRESETS)}.")] = None
    config: Path | None = None
    """JSON file with any part of the configuration, e.g. another run's config.json."""
    resume: bool = False
    """Go on from the run's newest checkpoint, if it has one; a finished run is left as it is."""
    tensorboard: bool = False
    """Write TensorBoard's event files as well: curves, reconstructions and samples, in RUN_DIR/tensorboard."""
    quiet: bool = False
    """Show warnings only."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    run: RunConfig = RunConfig()


def run(arguments: Sequence[str]) -> int:
    """Train, and say what to do next."""
    flags = parse(FitFlags, "fit", arguments, **_starting_point(arguments))
    sections = {name: getattr(flags, name).model_dump() for name in TrainConfig.model_fields}
    try:
        config = TrainConfig().with_changes(**sections)
    except ConfigError as error:  # the files were checked before
        raise UsageError(str(error)) from None
    log_to_stderr(quiet=flags.quiet)
    folder = shlex.quote(str(flags.run_dir))
    try:
        newest = fit(
            config,
            flags.run_dir,
            resume=flags.resume,
            show_progress=not flags.quiet,
            tensorboard=flags.tensorboard,
        )
    except KeyboardInterrupt:
        kept = checkpoint.latest(flags.run_dir)
        started = (flags.run_dir / checkpoint.CONFIG).is_file()
        board = ["--tensorboard"] if flags.tensorboard else []
        again = ["--run-dir", str(flags.run_dir), "--resume", *board] if started else arguments
        say(f"interrupted; {'no checkpoint was made yet' if kept is None else f'saved {kept}'}. To go on:")
        say(f"  {shlex.join(['vaeserve-train', 'fit', *again])}")
        return 130
    say(f"trained: {newest}. Next:")
    say(f"  vaeserve-train evaluate --run-dir {folder}")
    say(f"  vaeserve-train export --run-dir {folder} --name {shlex.quote(config.data.dataset)}")
    if flags.tensorboard:
        say(f"  tensorboard --logdir {folder}")
    return 0


def _starting_point(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the configuration, as sections, that the other flags change."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--config", "--run-dir"):
        early.add_argument(name)
    early.add_argument("--resume", action="store_true")
    try:
        known, _ = early.parse_known_args([with_hyphens(argument) for argument in arguments])
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if known.resume and known.run_dir and not known.preset and not known.config:
        base = _configuration_of(Path(known.run_dir))
    else:
        try:
            base = preset(known.preset or "mnist")
        except ConfigError as error:
            raise UsageError(str(error)) from None
    sections = base.model_dump()
    if known.config:
        for section, values in _read_sections(Path(known.config)).items():
            sections[section] |= values
    return sections


def _configuration_of(run_dir: Path) -> TrainConfig:
    """Return the configuration that a run was started with."""
    path = (checkpoint.latest(run_dir) or run_dir) / checkpoint.CONFIG
    if not path.is_file():
        raise ConfigError(f"{run_dir} holds no run to resume; name a --preset or a --config to start one there")
    return TrainConfig.from_json(path.read_bytes(), str(path))


def _read_sections(path: Path) -> dict[str, dict[str, Any]]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    TrainConfig.from_json(text, str(path))  # so that a mistake is told with the file's name
    sections: dict[str, dict[str, Any]] = json.loads(text)
    return sections
