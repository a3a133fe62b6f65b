"""Step 7: the trade between accuracy and closeness to the unit Gaussian, by the weight of the rate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.figures_ladder import Panel, Series
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.information import MutualInformation, marginal_kl, mutual_information, separability
from vaeserve_training.ladder.lab import Draw, Lab
from vaeserve_training.ladder.results import Claim, Figures, Findings, Picture, Table, latent_table, ratios
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec
from vaeserve_training.ladder.training import Trained
from vaeserve_training.ladder.wording import number, sizes

_TOLERANCE_NATS = 0.5  # by which a curve may fail to fall: the noise of one seed


def swept_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 7."""
    return [specs.variational_autoencoder(scale, seed, beta=beta) for beta in scale.betas for seed in scale.seeds]


def swept(lab: Lab) -> dict[float, list[Trained]]:
    """Return the trained systems by the weight of the rate, one per seed."""
    return {
        beta: [lab.trained(specs.variational_autoencoder(lab.scale, seed, beta=beta)) for seed in lab.scale.seeds]
        for beta in lab.scale.betas
    }


@dataclass(frozen=True)
class _Aggregate:
    """The bound of one system on unseen images, and what their posteriors are together."""

    distortion: float
    rate: float
    marginal_kl: Tensor  # nats, (D,)
    auc: float
    information: MutualInformation


def measure_tradeoff(lab: Lab) -> Findings:
    """Step 7: what a heavier rate buys and costs."""
    runs = swept(lab)
    found = {
        beta: [_aggregate(lab, run, seed) for run, seed in zip(runs[beta], lab.scale.seeds, strict=True)]
        for beta in runs
    }
    first = runs[lab.scale.betas[0]][0].system
    posteriors = number(len(lab.test_pixels))
    made_with = sizes(
        first.spec,
        lab.scale.seeds,
        f"{first.latent_size} latents",
        f"{posteriors} posteriors of unseen images",
        f"{number(lab.scale.draws)} draws for each mutual information",
        f"AUC of {posteriors} draws of either kind, half of them to train the classifier",
    )
    _draw(lab, found, made_with)
    return Findings(
        sizes=made_with,
        claims=_claims(found),
        tables=_tables(found, posteriors),
        pictures=(
            Picture(file="07-rate-distortion.png", caption="Distortion against rate, a point for each beta."),
            Picture(file="07-aggregate.png", caption="How far the aggregate posterior is from N(0, I)."),
        ),
        remarks=(
            "At beta 1 the loss is the bound on the likelihood. Above, it is a looser one; below, it is none. The "
            "other weights are chosen for what they do to reconstructions and samples.",
        ),
    )


def _tables(found: dict[float, list[_Aggregate]], posteriors: str) -> tuple[Table, ...]:
    ceiling = next(iter(found.values()))[0].information.ceiling_nats
    return (
        Table(
            title="Rate, distortion and the aggregate posterior, in nats",
            columns=("beta", "distortion", "rate", "marginal KL, sum", "marginal KL, largest", "AUC"),
            rows=tuple(
                (
                    f"{beta:g}",
                    tuple(one.distortion for one in of_beta),
                    tuple(one.rate for one in of_beta),
                    tuple(float(one.marginal_kl.sum()) for one in of_beta),
                    tuple(float(one.marginal_kl.max()) for one in of_beta),
                    tuple(one.auc for one in of_beta),
                )
                for beta, of_beta in found.items()
            ),
            note=f"Marginal KL: each latent's mixture of {posteriors} posteriors against N(0, 1), by quadrature. AUC: "
            "of a classifier that tells draws of the aggregate posterior from those of N(0, I); 0.5 is no difference.",
        ),
        latent_table(
            "Marginal KL of each latent in nats, falling",
            {
                f"beta {beta:g}": [sorted(one.marginal_kl.tolist(), reverse=True) for one in of_beta]
                for beta, of_beta in found.items()
            },
        ),
        Table(
            title=f"Mutual information of image and code, at most log N = {ceiling:.2f} nats (N = {posteriors} images)",
            columns=("beta", "estimate", "share of log N", "rate - estimate: joint KL of the mixture to N(0, I)"),
            rows=tuple(
                (
                    f"{beta:g}",
                    tuple(one.information.nats for one in of_beta),
                    tuple(one.information.saturation for one in of_beta),
                    tuple(one.rate - one.information.nats for one in of_beta),
                )
                for beta, of_beta in found.items()
            ),
            note="Where the share is near 1, the estimate tells how many images there were and nothing of the model, "
            "and the joint KL is that of a mixture of too few images, not of the model's aggregate posterior. Marginal "
            "KL and AUC know no such limit.",
        ),
    )


def _aggregate(lab: Lab, run: Trained, seed: int) -> _Aggregate:
    bound = lab.bound(run.system)
    mean, stddev = bound.posterior.mean, (0.5 * bound.posterior.log_variance).exp()
    rows, latents = mean.shape
    drawn = mean + stddev * lab.noise(rows, latents, draw=Draw.POSTERIOR, seed=seed)
    prior = lab.noise(rows, latents, draw=Draw.PRIOR, seed=seed)
    return _Aggregate(
        distortion=float(bound.distortion.mean()),
        rate=float(bound.rate.mean()),
        marginal_kl=marginal_kl(mean, stddev),
        auc=separability(drawn, prior, seed=seed),
        information=mutual_information(mean, stddev, draws=lab.scale.draws, seed=seed),
    )


def _claims(found: dict[float, list[_Aggregate]]) -> tuple[Claim, ...]:
    def per_seed(name: str) -> list[list[float]]:
        """Return, for each seed, the figures in the order of beta."""
        return [[getattr(one, name) for one in column] for column in zip(*found.values(), strict=True)]

    def marginal(beta: float) -> Figures:
        return tuple(float(one.marginal_kl.sum()) for one in found[beta])

    low, high = min(found), max(found)
    return (
        Claim.at_most(
            "The heavier the rate weighs, the lower it is.",
            "largest rise of the rate from one beta to the next, in nats",
            tuple(_largest_rise(rates) for rates in per_seed("rate")),
            _TOLERANCE_NATS,
        ),
        Claim.at_most(
            "And the less accurate the images are.",
            "largest fall of the distortion from one beta to the next, in nats",
            tuple(_largest_rise(distortions[::-1]) for distortions in per_seed("distortion")),
            _TOLERANCE_NATS,
        ),
        Claim.at_most(
            "The heavier the rate weighs, the closer the codes are to the unit Gaussian, latent by latent.",
            f"marginal KL, summed over the latents, at beta {high:g} as a multiple of that at {low:g}",
            ratios(marginal(high), marginal(low)),
            0.5,
        ),
        Claim.at_most(
            "And all latents together, too.",
            f"AUC between codes and N(0, I) at beta {high:g} less that at {low:g}",
            tuple(one.auc - other.auc for one, other in zip(found[high], found[low], strict=True)),
            -0.05,
        ),
    )


def _largest_rise(values: list[float]) -> float:
    return max(after - before for before, after in pairwise(values))


def _draw(lab: Lab, found: dict[float, list[_Aggregate]], made_with: str) -> None:
    betas = sorted(found)
    curves = [
        Series(
            f"seed {seed}" if len(lab.scale.seeds) > 1 else "",
            [found[beta][place].rate for beta in betas],
            [found[beta][place].distortion for beta in betas],
            names=[f"beta {beta:g}" for beta in betas],
        )
        for place, seed in enumerate(lab.scale.seeds)
    ]
    panel = Panel(x_label="rate, nats per image", y_label="distortion, nats per image", series=curves)
    figures.chart(lab.out / "07-rate-distortion.png", [panel], note=made_with)
    kl = [[float(one.marginal_kl.sum()) for one in found[beta]] for beta in betas]
    auc = [[one.auc for one in found[beta]] for beta in betas]
    figures.chart(
        lab.out / "07-aggregate.png",
        [
            Panel(
                title="latent by latent",
                x_label="beta, weight of the rate",
                y_label="marginal KL to N(0, 1), sum, nats",
                series=[Series.over_seeds("", betas, kl)],
                log_x=True,
                log_y=True,
                x_ticks=betas,
            ),
            Panel(
                title="all latents together",
                x_label="beta, weight of the rate",
                y_label="AUC, codes against N(0, I)",
                series=[Series.over_seeds("", betas, auc)],
                references=[("cannot be told apart", 0.5)],
                log_x=True,
                x_ticks=betas,
            ),
        ],
        note=made_with,
    )
