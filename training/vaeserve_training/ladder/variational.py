"""Step 5: the encoder gives a Gaussian, a draw from it is the code, and the loss charges for its rate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.evaluate import Bound
from vaeserve_training.figures_ladder import ImageRow, Panel, Series
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.information import kl_by_sampling
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.results import Claim, Figures, Findings, Picture, Table
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec, image_mse, intensity
from vaeserve_training.ladder.training import Trained
from vaeserve_training.ladder.wording import number, sizes
from vaeserve_training.models import PIXEL_MEAN_RANGE
from vaeserve_training.objectives import bernoulli_nll, kl_divergence

_SHOWN = 12
_KL_IMAGES = 500
_KL_DRAWS = 400

VAE = "VAE"
LITERAL = "mean squared error + KL"
CURE = "squared error, sigma learned"
_MAKERS = {VAE: specs.variational_autoencoder, LITERAL: specs.literal_loss, CURE: specs.learned_sigma}


def variational_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 5."""
    return [make(scale, seed) for make in _MAKERS.values() for seed in scale.seeds]


@dataclass(frozen=True)
class _Kind:
    """A kind of VAE: the runs, their bounds and mean squared errors on unseen images, one per seed."""

    runs: list[Trained]
    bounds: list[Bound]
    mse: Figures

    @property
    def neg_elbo(self) -> Figures:
        return tuple(bound.neg_elbo for bound in self.bounds)

    @property
    def rate(self) -> Figures:
        return tuple(float(bound.rate.mean()) for bound in self.bounds)

    @property
    def distortion(self) -> Figures:
        return tuple(float(bound.distortion.mean()) for bound in self.bounds)

    @property
    def active_units(self) -> Figures:
        return tuple(float(bound.active_units) for bound in self.bounds)


def measure_variational(lab: Lab) -> Findings:
    """Step 5: a Gaussian for a code, and two terms in the loss."""
    kinds = {name: _kind(lab, lab.per_seed(make)) for name, make in _MAKERS.items()}
    vae = kinds[VAE]
    latents = vae.runs[0].system.latent_size
    made_with = sizes(
        vae.runs[0].system.spec, lab.scale.seeds, f"{latents} latents", f"{number(len(lab.test_pixels))} unseen images"
    )
    kl = [_closed_and_sampled(bound, seed) for bound, seed in zip(vae.bounds, lab.scale.seeds, strict=True)]
    _draw(lab, kinds, kl[0], sizes(vae.runs[0].system.spec, lab.scale.seeds[:1], f"{latents} latents"))
    return Findings(
        sizes=made_with,
        claims=_claims(kinds, tuple(_standard_errors(*estimate) for estimate in kl), _pixel_mean_nats(lab)),
        tables=(
            Table(
                title="The bound on unseen images, nats per image",
                columns=("-ELBO", "distortion", "rate", f"active units of {latents}"),
                rows=((vae.neg_elbo, vae.distortion, vae.rate, vae.active_units),),
                note="Dynamic binarisation with a fixed seed, one posterior sample per image; binarised encoder input.",
            ),
            Table(
                title="The loss as it is often written, and a cure",
                columns=("loss", "rate in nats", f"active units of {latents}", "mean squared error"),
                rows=tuple((name, kind.rate, kind.active_units, kind.mse) for name, kind in kinds.items()),
                note="Unseen images. The error is that of the posterior mean's image against the grey image; the VAE "
                "is fed binarised images, the other two grey ones.",
            ),
        ),
        pictures=(
            Picture(file="05-reconstructions.png", caption="Unseen images, and what comes back under each loss."),
            Picture(file="05-over-training.png", caption="The VAE's distortion, and the rate under each loss."),
            Picture(
                file="05-kl.png",
                caption=f"KL of {_KL_IMAGES} posteriors to N(0, I): closed form against {_KL_DRAWS} draws of each.",
            ),
        ),
        remarks=(
            "mean(square(generated - real)) + KL divides the squared error by the number of pixels P, as a Gaussian "
            "decoder of variance P / 2 would. So much noise leaves nothing worth encoding: the posterior collapses to "
            "N(0, I), and every image comes back as the mean of all. The cure keeps the squared error and learns its "
            "weight, a Gaussian decoder with a sigma of its own; the VAE's Bernoulli decoder is another.",
        ),
    )


def _claims(kinds: dict[str, _Kind], standard_errors: Figures, pixel_mean_nats: float) -> tuple[Claim, ...]:
    return (
        Claim.at_most(
            "The code pays for itself: distortion + rate is below what images cost without any code.",
            "-ELBO of unseen images in nats; the bound is the cost of independent pixels at their mean",
            kinds[VAE].neg_elbo,
            pixel_mean_nats,
        ),
        Claim.at_most(
            "The closed-form KL is the expectation that it stands for.",
            "difference to the Monte Carlo estimate, in its standard errors",
            standard_errors,
            4.0,
        ),
        Claim.at_most(
            "The loss as often written, mean squared error + KL, collapses: the code says nothing.",
            "rate in nats",
            kinds[LITERAL].rate,
            0.1,
        ),
        Claim.at_most("Under it no latent is in use.", "active units", kinds[LITERAL].active_units, 0),
        Claim.at_least(
            "The same squared error with a learned sigma does not collapse.",
            "active units",
            kinds[CURE].active_units,
            5,
        ),
    )


def _kind(lab: Lab, runs: list[Trained]) -> _Kind:
    mse = [float(image_mse(run.system.reconstruct(lab.test_pixels), lab.test_pixels).mean()) for run in runs]
    return _Kind(runs, [lab.bound(run.system) for run in runs], tuple(mse))


def _closed_and_sampled(bound: Bound, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return closed-form KL, its estimate and the estimate's standard error for the first images, (N,) each."""
    mean, log_variance = (part[:_KL_IMAGES] for part in bound.posterior)
    closed = kl_divergence(mean, log_variance).sum(1)
    return closed, *kl_by_sampling(mean, log_variance, draws=_KL_DRAWS, seed=seed)


def _standard_errors(closed: Tensor, sampled: Tensor, error: Tensor) -> float:
    """Return how far the mean of the estimates is off, in standard errors of that mean."""
    return float((sampled - closed).sum().abs() / error.square().sum().sqrt())


def _pixel_mean_nats(lab: Lab) -> float:
    """Return -log p of unseen binarised images in nats if each pixel is drawn by itself, at its training mean."""
    mean = intensity(lab.train_pixels).mean(0).clamp(*PIXEL_MEAN_RANGE)
    # The expectation over the binarisation is the cross-entropy with the grey image.
    target = intensity(lab.test_pixels)
    return float(bernoulli_nll(mean.logit().expand_as(target), target).mean())


def _draw(lab: Lab, kinds: dict[str, _Kind], kl: tuple[Tensor, Tensor, Tensor], made_with: str) -> None:
    pixels = lab.test_pixels[:_SHOWN]
    rows = [ImageRow("unseen image", intensity(pixels).numpy())]
    rows += [ImageRow(name, kind.runs[0].system.reconstruct(pixels).numpy()) for name, kind in kinds.items()]
    figures.image_rows(lab.out / "05-reconstructions.png", rows, note=made_with)
    vae = kinds[VAE].runs[0].history
    steps = [record.step for record in vae]
    terms = {
        "-ELBO": [record.distortion + record.rate_nats for record in vae],
        "distortion": [record.distortion for record in vae],
        "rate": [record.rate_nats for record in vae],
    }
    rates = {name: [max(record.rate_nats, 1e-6) for record in kind.runs[0].history] for name, kind in kinds.items()}
    figures.chart(
        lab.out / "05-over-training.png",
        [
            Panel(
                title="the VAE's two terms",
                x_label="optimiser step",
                y_label="nats per training image",
                series=[Series(name, steps, values) for name, values in terms.items()],
                log_x=True,
            ),
            Panel(
                title="rate under each loss",
                x_label="optimiser step",
                y_label="nats per training image",
                series=[Series(name, steps, values) for name, values in rates.items()],
                log_x=True,
                log_y=True,
            ),
        ],
        note=made_with,
    )
    closed, sampled, _ = kl
    panel = Panel(
        x_label="closed form, nats",
        y_label="mean of the draws, nats",
        series=[Series("", closed.tolist(), sampled.tolist(), style="dots")],
        diagonal=True,
    )
    figures.chart(lab.out / "05-kl.png", [panel], note=made_with)
