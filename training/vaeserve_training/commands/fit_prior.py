"""`vaeserve-train fit-prior`: fit a flow to a trained model's aggregate posterior and keep it beside the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vaeserve_training import atomic, checkpoint, prior_fit
from vaeserve_training.checkpoint import CheckpointError
from vaeserve_training.commands.flags import Flags, log_to_stderr, parse, say
from vaeserve_training.compute import choose_device, cpu_threads
from vaeserve_training.config import ConfigError, PriorConfig
from vaeserve_training.data import load
from vaeserve_training.progress import Bar
from vaeserve_training.sources import DataError

USER_ERRORS = (ConfigError, DataError, CheckpointError, OSError)


class FitPriorFlags(Flags):
    """Fit a flow to a trained model's aggregate posterior.

    It is kept as prior.safetensors beside the run, where evaluate and export find it. N(0, I) stays the prior that the
    server samples from unless it is asked for the fitted one.
    """

    run_dir: Path
    """A run's folder (its newest checkpoint is taken), or one of its checkpoints."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where it works."""
    threads: int | None = None
    """CPU threads; unset: PyTorch's own choice."""
    quiet: bool = False
    """Show warnings only."""
    prior: PriorConfig = PriorConfig()


def run(arguments: Sequence[str]) -> int:
    """Fit, write the prior, say what to do next."""
    flags = parse(FitPriorFlags, "fit-prior", arguments)
    log_to_stderr(quiet=flags.quiet)
    device = choose_device(flags.device)
    model = checkpoint.load(flags.run_dir)
    path = prior_fit.default_path(model.path)
    atomic.require_writable(path)
    data = load(model.config.data)
    model.vae.to(device)
    with (
        cpu_threads(flags.threads),
        Bar("fitting the prior", flags.prior.steps, show=not flags.quiet) as bar,
    ):
        prior = prior_fit.fit_prior(model, data, flags.prior, advance=bar.advance)
    prior_fit.save(prior, path)
    say(f"wrote {path}; evaluate and export of this run take it from there")
    return 0
