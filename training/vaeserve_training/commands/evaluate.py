"""`vaeserve-train evaluate`: held-out figures as a table on the terminal and as JSON beside the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console

from vaeserve_training import atomic, checkpoint, fid, prior_fit, report
from vaeserve_training.checkpoint import CheckpointError
from vaeserve_training.commands.flags import Flags, log_to_stderr, parse, say
from vaeserve_training.compute import choose_device
from vaeserve_training.config import ConfigError
from vaeserve_training.data import load
from vaeserve_training.evaluate import DEFAULT_BATCH_SIZE, evaluate, work
from vaeserve_training.progress import Bar
from vaeserve_training.report import EvaluationError
from vaeserve_training.sources import DataError

USER_ERRORS = (ConfigError, DataError, CheckpointError, EvaluationError, OSError)


class EvaluateFlags(Flags):
    """Compute held-out figures of a trained model on the test images of the data set it was trained on.

    Where the run has a fitted prior (vaeserve-train fit-prior), the figures under it stand beside those under N(0, I).
    """

    run_dir: Path
    """A run's folder (its newest checkpoint is taken), or one of its checkpoints."""
    iw_samples: Annotated[int, Field(ge=0)] = 0
    """Importance samples k of the importance-weighted NLL, 5000 in the literature; 0 leaves it out."""
    images: Annotated[int | None, Field(ge=1)] = None
    """Use only the first so many test images; the protocol says so."""
    fid_samples: Annotated[int, Field(ge=0)] = 0
    """Samples under each prior whose FID-LeNet is wanted, e.g. 10000; needs labels and trains a classifier first."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the binarisation (or dequantisation) and of the posterior noise."""
    batch_size: Annotated[int, Field(ge=1)] = DEFAULT_BATCH_SIZE
    """Images in memory at once; the figures do not depend on it."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where it works."""
    output: Path | None = None
    """JSON file to write; unset: evaluation.json in the run's folder."""
    quiet: bool = False
    """Show no progress and no table."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate, write the JSON, show the table."""
    flags = parse(EvaluateFlags, "evaluate", arguments)
    log_to_stderr(quiet=flags.quiet)
    device = choose_device(flags.device)
    model = checkpoint.load(flags.run_dir)
    output = flags.output or report.default_path(model.path)
    atomic.require_writable(output)
    data = load(model.config.data)
    likelihood = model.config.objective.likelihood
    fitted = prior_fit.load_for(model)
    digest = "" if fitted is None else fitted.sha256
    prior = None if fitted is None else fitted.flow.to(device)
    total = work(data, iw_samples=flags.iw_samples, images=flags.images, prior=prior)
    with Bar("evaluating", total, show=not flags.quiet) as bar:
        found = evaluate(
            model.vae.to(device),
            data,
            likelihood,
            seed=flags.seed,
            iw_samples=flags.iw_samples,
            batch_size=flags.batch_size,
            images=flags.images,
            prior=prior,
            advance=bar.advance,
        )
    quality = None
    if flags.fid_samples:
        with Bar("training FID-LeNet", fid.work(data), show=not flags.quiet) as bar:
            quality = fid.fid_lenet(
                model.vae, data, flags.fid_samples, prior=prior, seed=flags.seed, advance=bar.advance
            )
    found = replace(found, weights_sha256=model.weights_sha256, prior_sha256=digest, fid_lenet=quality)
    content = found.to_json()
    if not flags.quiet:
        Console().print(report.table(found))
    try:
        atomic.write_file(output, content.encode())
    except OSError as error:
        say(content)  # hours of work may be in it
        raise EvaluationError(f"{output} cannot be written: {error.strerror}; it was printed instead") from None
    say(f"wrote {output}")
    return 0
