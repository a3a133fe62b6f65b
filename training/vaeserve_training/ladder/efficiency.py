"""Step 9: "the more efficiently we encode, the more we can raise the standard deviation towards one"."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.evaluate import Bound
from vaeserve_training.figures_ladder import Panel, Series
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.results import Claim, Figures, Findings, Picture, Table, latent_table
from vaeserve_training.ladder.tradeoff import swept
from vaeserve_training.ladder.wording import number, sizes
from vaeserve_training.objectives import kl_divergence


@dataclass(frozen=True)
class _Latents:
    """Averages over unseen images for each latent, (D,), by falling KL, and how many are in use."""

    stddev: Tensor
    kl_nats: Tensor
    active_units: int


def measure_efficiency(lab: Lab) -> Findings:
    """Step 9: the latents one by one, over beta and over training."""
    over_beta = {beta: [_latents(lab.bound(run.system)) for run in runs] for beta, runs in swept(lab).items()}
    vae = lab.per_seed(specs.variational_autoencoder)
    steps = [*sorted(vae[0].snapshots), vae[0].steps]
    over_training = {
        step: [_latents(lab.bound(run.system if step == run.steps else run.at(step))) for run in vae] for step in steps
    }
    size = vae[0].system.latent_size
    made_with = sizes(
        vae[0].system.spec, lab.scale.seeds, f"{size} latents", f"{number(len(lab.test_pixels))} unseen images"
    )
    one_seed = sizes(
        vae[0].system.spec, lab.scale.seeds[:1], f"{size} latents", f"{number(len(lab.test_pixels))} unseen images"
    )
    _draw(lab, over_beta, over_training, one_seed)
    return Findings(
        sizes=made_with,
        claims=_claims(over_beta, over_training),
        tables=(
            Table(
                title="Over the weight of the rate",
                columns=("beta", "mean stddev", "smallest", "largest", "KL in nats, sum", f"active units of {size}"),
                rows=tuple((f"{beta:g}", *_columns(of_beta)) for beta, of_beta in over_beta.items()),
                note="Posterior standard deviations and KL per latent, averages over unseen images.",
            ),
            Table(
                title="Over training, beta 1",
                columns=("step", "mean stddev", "smallest", "largest", "KL in nats, sum", f"active units of {size}"),
                rows=tuple((step, *_columns(of_step)) for step, of_step in over_training.items()),
            ),
            *_latent_tables(over_beta, over_training),
        ),
        pictures=(
            Picture(
                file="09-over-beta.png", caption="Each latent's standard deviation and KL, by falling KL, over beta."
            ),
            Picture(file="09-over-training.png", caption="The same over training."),
        ),
        remarks=(
            "A latent with a standard deviation of one and a mean of nought says nothing and costs nothing. Over "
            "training the standard deviations go the other way: they fall from one as the latents are put to use, "
            "because accuracy is worth more than the rate it costs.",
        ),
    )


def _latents(bound: Bound) -> _Latents:
    mean, log_variance = bound.posterior
    kl = kl_divergence(mean, log_variance).mean(0)
    order = kl.argsort(descending=True)
    stddev = (0.5 * log_variance).exp().mean(0)
    return _Latents(stddev[order], kl[order], bound.active_units)


def _columns(latents: list[_Latents]) -> tuple[Figures, ...]:
    return (
        tuple(float(one.stddev.mean()) for one in latents),
        tuple(float(one.stddev.min()) for one in latents),
        tuple(float(one.stddev.max()) for one in latents),
        tuple(float(one.kl_nats.sum()) for one in latents),
        tuple(float(one.active_units) for one in latents),
    )


def _latent_tables(
    over_beta: dict[float, list[_Latents]], over_training: dict[int, list[_Latents]]
) -> tuple[Table, ...]:
    """Return the pictures' figures, latent by latent."""
    rows = {f"beta {beta:g}": of_beta for beta, of_beta in over_beta.items()}
    rows |= {f"beta 1, step {number(step)}": of_step for step, of_step in over_training.items()}
    return (
        latent_table(
            "Posterior standard deviation of each latent, by falling KL",
            {name: [one.stddev.tolist() for one in latents] for name, latents in rows.items()},
        ),
        latent_table(
            "KL of each latent in nats, falling",
            {name: [one.kl_nats.tolist() for one in latents] for name, latents in rows.items()},
        ),
    )


def _claims(over_beta: dict[float, list[_Latents]], over_training: dict[int, list[_Latents]]) -> tuple[Claim, ...]:
    by_beta = [[float(one.stddev.mean()) for one in column] for column in zip(*over_beta.values(), strict=True)]
    units = [[one.active_units for one in column] for column in zip(*over_beta.values(), strict=True)]
    by_step = [[float(one.stddev.mean()) for one in column] for column in zip(*over_training.values(), strict=True)]
    return (
        Claim.at_least(
            "The more the rate weighs, the more the standard deviation rises towards one.",
            "smallest rise of the mean standard deviation from one beta to the next",
            tuple(min(after - before for before, after in pairwise(row)) for row in by_beta),
            0.0,
        ),
        Claim.at_most(
            "Latents that are not worth their rate are given up.",
            "active units at the largest beta less those at the smallest",
            tuple(float(row[-1] - row[0]) for row in units),
            0,
        ),
        Claim.at_most(
            "The latents that say more are the ones with less noise.",
            "rank correlation of standard deviation and KL over the latents, at beta 1",
            tuple(_rank_correlation(one.stddev, one.kl_nats) for one in over_beta[1.0]),
            -0.8,
        ),
        Claim.at_least(
            "Training raises the standard deviation towards one.",
            "mean standard deviation at the end less that before the first step",
            tuple(row[-1] - row[0] for row in by_step),
            0.0,
            otherwise="Training starts near one and ends below: a VAE that does not code yet has nothing to save.",
        ),
    )


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two lists without ties."""
    ranks = torch.stack([first.argsort().argsort(), second.argsort().argsort()]).double()
    return float(ranks.corrcoef()[0, 1])


def _draw(
    lab: Lab, over_beta: dict[float, list[_Latents]], over_training: dict[int, list[_Latents]], made_with: str
) -> None:
    labelled = {
        "09-over-beta.png": {f"beta {beta:g}": latents[0] for beta, latents in over_beta.items()},
        "09-over-training.png": {f"step {number(step)}": latents[0] for step, latents in over_training.items()},
    }
    for file, of_file in labelled.items():
        ranks = range(1, len(next(iter(of_file.values())).stddev) + 1)
        figures.chart(
            lab.out / file,
            [
                Panel(
                    x_label="latent, by falling KL",
                    y_label="posterior standard deviation",
                    series=[Series(name, ranks, latents.stddev.tolist()) for name, latents in of_file.items()],
                    references=[("that of the prior", 1.0)],
                    ordered=True,
                ),
                Panel(
                    x_label="latent, by falling KL",
                    y_label="KL to N(0, 1), nats",
                    series=[Series(name, ranks, latents.kl_nats.tolist()) for name, latents in of_file.items()],
                    ordered=True,
                ),
            ],
            note=made_with,
        )
