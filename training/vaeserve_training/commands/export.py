"""`vaeserve-train export`: publish a trained model as a bundle that the server can load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vaeserve_training import atomic, bundle, checkpoint, report
from vaeserve_training.bundle import BundleError
from vaeserve_training.checkpoint import Checkpoint, CheckpointError
from vaeserve_training.commands.flags import Flags, log_to_stderr, parse, say
from vaeserve_training.compute import choose_device
from vaeserve_training.config import ConfigError
from vaeserve_training.data import ImageData, load
from vaeserve_training.evaluate import evaluate
from vaeserve_training.export import export
from vaeserve_training.onnx_graphs import ExportError
from vaeserve_training.progress import Bar
from vaeserve_training.report import EvaluationError, Report
from vaeserve_training.sources import DataError

USER_ERRORS = (BundleError, ConfigError, DataError, CheckpointError, EvaluationError, ExportError, OSError)


class ExportFlags(Flags):
    """Publish a trained model as a bundle: two ONNX graphs, proven equal to the model, and a card.

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
    data = load(model.config.data)
    found = _evaluation(model, data, flags) if flags.evaluate else None
    folder = export(model.path, flags.models, name=flags.name, version=flags.version, evaluation=found, data=data)
    say(f"published {folder}")
    for graph in bundle.read_card(folder).graphs:
        for parity in graph.parity:
            sizes = ", ".join(map(str, parity.batch_sizes))
            say(
                f"  {graph.file} on {parity.provider}: within {parity.max_abs_error:.1e} of PyTorch "
                f"at batch sizes {sizes}"
            )
    return 0


def _evaluation(model: Checkpoint, data: ImageData, flags: ExportFlags) -> Report:
    """Return the run's report if it is of these weights; otherwise evaluate, and write the report beside the run."""
    path = report.default_path(model.path)
    if path.is_file():
        known = Report.from_json(path)
        if known.weights_sha256 == model.weights_sha256:
            return known
    vae = model.vae.to(choose_device(flags.device))
    with Bar("evaluating", len(data.test), show=not flags.quiet) as bar:
        found = evaluate(vae, data, model.config.objective.likelihood, advance=bar.advance)
    found = replace(found, weights_sha256=model.weights_sha256)
    atomic.write_file(path, found.to_json().encode())
    return found
