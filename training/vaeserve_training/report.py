"""A model's held-out figures as JSON for programs and as a table for people, with the protocol in words in both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from google.protobuf import json_format
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vaeserve.v1 import vae_pb2
from vaeserve_training import checkpoint

FILE = "evaluation.json"
FIGURES = {
    "-ELBO": "neg_elbo_nats",
    "rate": "rate_nats",
    "distortion": "distortion_nats",
    "loss, no likelihood": "loss",
    "importance-weighted NLL": "iw_nll_nats",
    "-ELBO in bits per dimension": "bits_per_dim",
    "active units": "active_units",
}
"""The figures of an Evaluation: in words, and by their names in vae.proto."""
_LATENTS_SHOWN = 32


class EvaluationError(RuntimeError):
    """Figures that cannot be computed or read. The message says why and what to do."""


@dataclass(frozen=True)
class Fid:
    """FID-LeNet, see fid.py: squared Frechet distances of `samples` images to as many training images."""

    samples: int
    standard: float
    """Decoded draws from N(0, I)."""
    fitted: float | None
    """Decoded draws from the fitted prior, from the same noise; None if there is none."""
    test: float
    """Test images: the floor, what real images reach with this many."""
    accuracy: float
    """Share of the test images that the classifier takes for what they are."""


@dataclass(frozen=True)
class Report:
    """What `vaeserve-train evaluate` finds: one Evaluation per protocol, and the latents under the first of them.

    `weights_sha256` is the digest of the weights that were evaluated, as in `checkpoint.Checkpoint`; '' if not known.
    `prior_sha256` is that of the fitted prior, '' if there was none.
    """

    evaluations: list[vae_pb2.Evaluation]
    latent_statistics: vae_pb2.LatentStatistics
    weights_sha256: str = ""
    prior_sha256: str = ""
    fid_lenet: Fid | None = None

    def to_json(self) -> str:
        """Return the report as indented JSON, with the field names of vae.proto."""
        return json.dumps(
            {
                "weights_sha256": self.weights_sha256,
                "prior_sha256": self.prior_sha256,
                "evaluations": [_to_dict(evaluation) for evaluation in self.evaluations],
                "latent_statistics": _to_dict(self.latent_statistics),
                "fid_lenet": None if self.fid_lenet is None else asdict(self.fid_lenet),
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, path: Path) -> Report:
        """Read a file that `to_json` was written to; EvaluationError if it is missing or something else."""
        try:
            record = json.loads(path.read_bytes())
            evaluations = [json_format.ParseDict(entry, vae_pb2.Evaluation()) for entry in record["evaluations"]]
            latents = json_format.ParseDict(record["latent_statistics"], vae_pb2.LatentStatistics())
            fid = record.get("fid_lenet")
            return cls(
                evaluations,
                latents,
                str(record["weights_sha256"]),
                str(record["prior_sha256"]),
                None if fid is None else Fid(**fid),
            )
        except OSError as error:
            raise EvaluationError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
            raise EvaluationError(f"{path} is no report of vaeserve-train evaluate: {error}") from error


def default_path(path: Path) -> Path:
    """Return where the report on a checkpoint belongs: in its run's folder, or beside a checkpoint taken out of it."""
    return checkpoint.beside(path, FILE)


def table(report: Report) -> Group:
    """Return the report for a terminal: figures, their protocols in words, and the latents by falling KL."""
    figures = Table(title="Held-out figures")
    figures.add_column("nats per image" if report.evaluations[0].HasField("neg_elbo_nats") else "")
    protocols = []
    for number, entry in enumerate(report.evaluations, start=1):
        figures.add_column(f"protocol ({number})", justify="right")
        protocols.append(Text(f"({number}) {entry.protocol}"))
    for words, name in FIGURES.items():
        values = [f"{getattr(entry, name):.6g}" if entry.HasField(name) else "" for entry in report.evaluations]
        if any(values):
            figures.add_row(words, *values)
    samples = [] if report.fid_lenet is None else [_fid_table(report.fid_lenet)]
    return Group(figures, *protocols, *samples, _latent_table(report.latent_statistics))


def _fid_table(fid: Fid) -> Table:
    distances = Table(
        title="FID-LeNet, less is better",
        caption=f"{fid.samples} decoded means against as many training images; classifier trained here, "
        f"{fid.accuracy:.1%} of the test images right",
    )
    distances.add_column("images")
    distances.add_column("distance", justify="right")
    rows = {
        "draws from N(0, I)": fid.standard,
        "draws from the fitted prior": fid.fitted,
        "test images (floor)": fid.test,
    }
    for words, value in rows.items():
        if value is not None:
            distances.add_row(words, f"{value:.4g}")
    return distances


def _latent_table(statistics: vae_pb2.LatentStatistics) -> Table:
    order = sorted(range(len(statistics.kl_nats)), key=lambda latent: -statistics.kl_nats[latent])
    left_out = len(order) - _LATENTS_SHOWN
    caption = f"{left_out} more latents are in the JSON report" if left_out > 0 else None
    latents = Table(title="Latents under protocol (1), by falling KL", caption=caption)
    for column in ("latent", "KL (nats)", "mean posterior stddev", "aggregate mean", "aggregate stddev"):
        latents.add_column(column, justify="right")
    columns = (statistics.kl_nats, statistics.mean_posterior_stddev, statistics.mean, statistics.stddev)
    for latent in order[:_LATENTS_SHOWN]:
        latents.add_row(str(latent), *(f"{column[latent]:.3f}" for column in columns))
    return latents


def _to_dict(message: vae_pb2.Evaluation | vae_pb2.LatentStatistics) -> dict[str, object]:
    return json_format.MessageToDict(message, preserving_proto_field_name=True)
