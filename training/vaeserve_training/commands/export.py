"""`vaeserve-train export`: publish a trained model as a bundle that the server can load."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vaeserve_training import atomic, bundle, checkpoint, prior_fit, report
from vaeserve_training.bundle import BundleError
from vaeserve_training.checkpoint import Checkpoint, CheckpointError
from vaeserve_training.commands.flags import Flags, log_to_stderr, parse, say
from vaeserve_training.compute import choose_device
from vaeserve_training.config import ConfigError
from vaeserve_training.data import ImageData, load
from vaeserve_training.evaluate import evaluate, work
from vaeserve_training.export import export
from vaeserve_training.onnx_graphs import ExportError
from vaeserve_training.prior_fit import FittedPrior
from vaeserve_training.progress import Bar
from vaeserve_training.report import EvaluationError, Report
from vaeserve_training.sources import DataError

logger = logging.getLogger(__name__)

USER_ERRORS = (BundleError, ConfigError, DataError, CheckpointError, EvaluationError, ExportError, OSError)


class ExportFlags(Flags):
    """Publish a trained model as a bundle: ONNX graphs, proven equal to the model, and a card.

    A prior that was fitted to the model (vaeserve-train fit-prior) goes with it, as a third graph.
    The card's held-out figures are those of the run's evaluation.json if it is of the same weights; otherwise the model
    is evaluated first.
    """

    run_dir: Path
    """A run's folder (its newest checkpoint is taken), or one of its checkpoints."""
    name: str
    """Name to serve the model under."""
    models: Path = Path("models")
    """Folder of published models; the bundle becomes MODELS/NAME/VERSION."""
    version: Annotated[int | None, Field(ge=1)] = None
    """Version to publish; unset: the next free one."""
    evaluate: bool = True
    """Leave the held-out figures out of the card."""
    prior: bool = True
    """Leave a fitted prior out of the bundle."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """fp16 publishes encoder and decoder a second time, computing in float16, for a server with --precision fp16."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to evaluate; auto takes CUDA where it works."""
    quiet: bool = False
    """Show warnings only."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate if need be, export, say where the bundle is and how exact it is."""
    flags = parse(ExportFlags, "export", arguments)
    log_to_stderr(quiet=flags.quiet)
    bundle.check_name(flags.name)
    if flags.version is not None:
        bundle.check_version_is_free(flags.models, flags.name, flags.version)
    model = checkpoint.load(flags.run_dir)
    atomic.require_writable(flags.models / flags.name / "version")
    data = load(model.config.data)
    prior = prior_fit.load_for(model) if flags.prior else None
    found = _evaluation(model, data, flags, prior) if flags.evaluate else None
    folder = export(
        model.path,
        flags.models,
        name=flags.name,
        version=flags.version,
        evaluation=found,
        prior=prior,
        data=data,
        float16=flags.precision == "fp16",
    )
    say(f"published {folder}")
    card = bundle.read_card(folder)
    for graph in (*card.graphs, *card.float16_graphs):
        for parity in graph.parity:
            sizes = ", ".join(map(str, parity.batch_sizes))
            say(
                f"  {graph.file} on {parity.provider}: within {parity.max_abs_error:.1e} of PyTorch "
                f"at batch sizes {sizes}"
            )
    return 0


def _evaluation(model: Checkpoint, data: ImageData, flags: ExportFlags, prior: FittedPrior | None) -> Report:
    """Return the run's report if it is of these weights and this prior, else evaluate and write one."""
    path = report.default_path(model.path)
    digest = "" if prior is None else prior.sha256
    if path.is_file():
        known = Report.from_json(path)
        if (known.weights_sha256, known.prior_sha256) == (model.weights_sha256, digest):
            return known
    device = choose_device(flags.device)
    flow = None if prior is None else copy.deepcopy(prior.flow).to(device)
    with Bar("evaluating", work(data, iw_samples=0, prior=flow), show=not flags.quiet) as bar:
        likelihood = model.config.objective.likelihood
        found = evaluate(model.vae.to(device), data, likelihood, prior=flow, advance=bar.advance)
    found = replace(found, weights_sha256=model.weights_sha256, prior_sha256=digest)
    try:
        atomic.write_file(path, found.to_json().encode())
    except OSError as error:  # the run may lie where nobody may write; the card has the figures all the same
        logger.warning("the figures are not kept beside the run: %s: %s", path, error.strerror)
    return found
