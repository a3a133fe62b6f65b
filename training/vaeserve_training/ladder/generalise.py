"""Step 10: "this constraint improves generalisation", by the number of training images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.figures_ladder import ImageRow, Panel, Series
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.lab import Draw, Lab
from vaeserve_training.ladder.priors import FITTED, PRIORS, UNIT
from vaeserve_training.ladder.results import Claim, Figures, Findings, Picture, Table, differences, mean, ratios
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec, System, image_mse, intensity
from vaeserve_training.ladder.wording import listed, number, sizes
from vaeserve_training.objectives import bernoulli_nll

AUTOENCODER = "autoencoder"
VAE = "VAE"
_MAKERS = {AUTOENCODER: specs.autoencoder, VAE: specs.variational_autoencoder}
_GAP_IMAGES = 10_000  # images at most on which an error is measured
_SHOWN = 12
_TRAINING = ", training"


@dataclass(frozen=True)
class _Found:
    """One system: distortion in nats and mean squared error, on training and unseen images, and its images' FID.

    At the mean: without the noise of the posterior, as for an autoencoder's codes, which have none.
    """

    train_distortion: float
    test_distortion: float
    train_at_mean: float
    test_at_mean: float
    train_mse: float
    test_mse: float
    samples_fid: float
    fitted_fid: float
    midpoints_fid: float
    unseen_fid: float
    unseen_accuracy: float

    @property
    def gap(self) -> float:
        """Nats by which unseen images cost more than training images."""
        return self.test_distortion - self.train_distortion


Everything = dict[tuple[str, int], list[_Found]]


def growing_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 10."""
    return [
        _spec(scale, name, images, seed) for images in scale.growing_images for name in _MAKERS for seed in scale.seeds
    ]


def _spec(scale: Scale, name: str, images: int, seed: int) -> Spec:
    # With all images it is the very system of steps 4 and 5, so that it is trained once.
    return _MAKERS[name](scale, seed, images=None if images == scale.train_images else images)


def measure_generalisation(lab: Lab) -> Findings:
    """Step 10: autoencoder against VAE as the training images grow in number."""
    counts, seeds = lab.scale.growing_images, lab.scale.seeds
    systems = {
        (name, images): [lab.trained(_spec(lab.scale, name, images, seed)).system for seed in seeds]
        for name in _MAKERS
        for images in counts
    }
    found: Everything = {
        key: [_measure(lab, system, seed) for system, seed in zip(of_key, seeds, strict=True)]
        for key, of_key in systems.items()
    }
    made_with = sizes(
        systems[VAE, counts[-1]][0].spec,
        seeds,
        f"FID-LeNet on {number(lab.scale.samples)} images a side",
        images=f"{listed(counts)} training images, at equal training",
    )
    _draw(lab, systems, found, made_with)
    return Findings(
        sizes=made_with,
        claims=_claims(found, counts),
        tables=_tables(found),
        pictures=(
            Picture(file="10-errors.png", caption="Errors on training and on unseen images, and their gap."),
            Picture(file="10-quality.png", caption="Distance to the data of samples, midpoints and reconstructions."),
            Picture(
                file="10-pictures.png", caption=f"Samples and midpoints after {number(counts[0])} training images."
            ),
        ),
        remarks=(
            "Every system takes as many optimiser steps, give or take one pass over its images, so those with few "
            f"images see them often: here {_passes(systems, counts)} times. The VAE's codes are drawn from its "
            "posterior where distortion and gap are counted, and are the posterior's means where images are compared "
            "or a column says so; an autoencoder's code is the same in both. Reconstruction is where the plain "
            "autoencoder may win: the claims on codes and reconstructions of unseen images say whether it does.",
        ),
    )


def _passes(systems: dict[tuple[str, int], list[System]], counts: tuple[int, ...]) -> str:
    """Return how often each system sees its images, by their number."""
    return listed([systems[VAE, images][0].spec.config.optimiser.epochs for images in counts])


def _measure(lab: Lab, system: System, seed: int) -> _Found:
    samples, unseen = lab.scale.samples, lab.test_pixels[: lab.scale.samples]
    seen = lab.train_pixels[: min(system.spec.images, _GAP_IMAGES)]
    reconstructed = system.reconstruct(unseen)
    codes = system.encode(unseen)
    first, second = lab.pairs(samples, len(codes), seed=seed)
    midpoints = system.decode((codes[first] + codes[second]) / 2)
    return _Found(
        train_distortion=_distortion(system, seen, _noise(lab, system, seen, seed)),
        test_distortion=_distortion(system, lab.test_pixels, _noise(lab, system, lab.test_pixels, seed)),
        train_at_mean=_distortion(system, seen, None),
        test_at_mean=_distortion(system, lab.test_pixels, None),
        train_mse=float(image_mse(system.reconstruct(seen), seen).mean()),
        test_mse=float(image_mse(system.reconstruct(lab.test_pixels), lab.test_pixels).mean()),
        samples_fid=lab.fid(system.decode(PRIORS[UNIT](lab, system, samples, seed))),
        fitted_fid=lab.fid(system.decode(PRIORS[FITTED](lab, system, samples, seed))),
        midpoints_fid=lab.fid(midpoints),
        unseen_fid=lab.fid(reconstructed),
        unseen_accuracy=lab.classifier.accuracy(reconstructed, lab.test_labels[:samples]),
    )


def _noise(lab: Lab, system: System, pixels: Tensor, seed: int) -> Tensor:
    return lab.noise(len(pixels), system.latent_size, draw=Draw.POSTERIOR, seed=seed)


def _distortion(system: System, pixels: Tensor, noise: Tensor | None) -> float:
    """Return -log p(x|z) in nats per image, z the code that the source gives with that noise, or its mean."""
    target = system.observe(pixels).target
    return float(bernoulli_nll(system.logits(system.encode(pixels, noise)), target).mean())


def _figures(found: list[_Found], name: str) -> Figures:
    return tuple(getattr(one, name) for one in found)


def _claims(found: Everything, counts: tuple[int, ...]) -> tuple[Claim, ...]:
    claims: list[Claim] = []
    for images in counts:
        plain, vae = found[AUTOENCODER, images], found[VAE, images]
        trained_on = f"with {number(images)} training images"
        mse = ratios(_figures(vae, "test_mse"), _figures(plain, "test_mse"))
        nats = differences(_figures(vae, "test_at_mean"), _figures(plain, "test_at_mean"))
        fid = ratios(_figures(vae, "unseen_fid"), _figures(plain, "unseen_fid"))
        claims += [
            Claim.at_most(
                f"The gap between training and unseen images is smaller for the VAE, {trained_on}.",
                "the VAE's gap in distortion, in nats, less the autoencoder's",
                differences(_figures(vae, "gap"), _figures(plain, "gap")),
                0.0,
            ),
            Claim.at_most(
                f"The VAE's samples from N(0, I) are nearer to the data, {trained_on}.",
                "FID-LeNet of the VAE's samples as a multiple of the autoencoder's",
                ratios(_figures(vae, "samples_fid"), _figures(plain, "samples_fid")),
                1.0,
            ),
            Claim.at_most(
                f"Midway between codes of unseen images lie better images in the VAE, {trained_on}.",
                "FID-LeNet of the VAE's midpoints as a multiple of the autoencoder's",
                ratios(_figures(vae, "midpoints_fid"), _figures(plain, "midpoints_fid")),
                1.0,
                otherwise="The plain autoencoder's midpoints are nearer to the data by this measure.",
            ),
            Claim.at_most(
                f"Codes of unseen images hold them better in the VAE, {trained_on}.",
                "mean squared error of unseen images in the VAE as a multiple of the autoencoder's",
                mse,
                1.0,
                otherwise=_winner(mse, 1.0),
            ),
            Claim.at_most(
                f"They do so in nats, too, {trained_on}.",
                "the VAE's distortion of unseen images at the posterior's mean, in nats, less the autoencoder's",
                nats,
                0.0,
                otherwise=_winner(nats, 0.0),
            ),
            Claim.at_most(
                f"Reconstructions of unseen images are nearer to the data from the VAE, {trained_on}.",
                "FID-LeNet of the VAE's reconstructions as a multiple of the autoencoder's",
                fid,
                1.0,
                otherwise=f"{_winner(fid, 1.0)} The VAE's noise costs sharpness.",
            ),
        ]
    return tuple(claims)


def _winner(figures: Figures, bound: float) -> str:
    """Return who reconstructs better, where it is not the VAE with every seed."""
    if mean(figures) <= bound:
        return "Neither is ahead with every seed."
    return "The plain autoencoder wins: reconstruction is all that it was trained for."


def _tables(found: Everything) -> tuple[Table, Table]:
    errors = ("train_distortion", "test_distortion", "gap", "train_at_mean", "test_at_mean", "train_mse", "test_mse")
    quality = ("samples_fid", "fitted_fid", "midpoints_fid", "unseen_fid", "unseen_accuracy")
    by_size = sorted(found, key=lambda key: (key[1], key[0]))
    return (
        Table(
            title="Errors on training and on unseen images",
            columns=(
                "training images",
                "system",
                "distortion, training, nats",
                "distortion, unseen, nats",
                "gap, nats",
                "distortion at the mean, training, nats",
                "distortion at the mean, unseen, nats",
                "mean squared error, training",
                "mean squared error, unseen",
            ),
            rows=tuple(
                (images, name, *(_figures(found[name, images], figure) for figure in errors))
                for name, images in by_size
            ),
        ),
        Table(
            title="Quality of images, FID-LeNet",
            columns=(
                "training images",
                "system",
                f"samples, {UNIT}",
                f"samples, {FITTED}",
                "midpoints of codes of unseen images",
                "reconstructions of unseen images",
                "of these, recognised",
            ),
            rows=tuple(
                (images, name, *(_figures(found[name, images], figure) for figure in quality))
                for name, images in by_size
            ),
            note="Midpoints are those of random pairs. Recognised: share of reconstructions that the classifier takes "
            "for the digit that they are of.",
        ),
    )


def _draw(lab: Lab, systems: dict[tuple[str, int], list[System]], found: Everything, made_with: str) -> None:
    counts = list(lab.scale.growing_images)

    def panel(title: str, y_label: str, named: dict[str, str]) -> Panel:
        series = [
            Series.over_seeds(
                f"{system}{words}",
                counts,
                [_figures(found[system, images], figure) for images in counts],
                colour=2 * place + (words == _TRAINING),  # a system's unseen images look the same in all panels
            )
            for place, system in enumerate(_MAKERS)
            for words, figure in named.items()
        ]
        return Panel(title=title, x_label="training images", y_label=y_label, series=series, log_x=True, x_ticks=counts)

    figures.chart(
        lab.out / "10-errors.png",
        [
            panel("distortion", "nats per image", {", unseen": "test_distortion", _TRAINING: "train_distortion"}),
            panel("gap, unseen less training", "nats per image", {"": "gap"}),
            panel("reconstruction of unseen images", "mean squared error", {"": "test_mse"}),
        ],
        note=made_with,
    )
    figures.chart(
        lab.out / "10-quality.png",
        [
            panel(f"samples from {UNIT}", "FID-LeNet", {"": "samples_fid"}),
            panel("midpoints", "FID-LeNet", {"": "midpoints_fid"}),
            panel("reconstructions", "FID-LeNet", {"": "unseen_fid"}),
        ],
        note=made_with,
    )
    first, second = lab.pairs(_SHOWN, len(lab.test_pixels), seed=lab.scale.seeds[0])
    rows = [ImageRow("one unseen image", intensity(lab.test_pixels[first]).numpy())]
    for name in _MAKERS:
        system = systems[name, counts[0]][0]
        middle = (system.encode(lab.test_pixels)[first] + system.encode(lab.test_pixels)[second]) / 2
        rows.append(ImageRow(f"{name}, midpoint", system.decode(middle).numpy()))
    rows.append(ImageRow("the other", intensity(lab.test_pixels[second]).numpy()))
    for name in _MAKERS:
        system = systems[name, counts[0]][0]
        samples = system.decode(PRIORS[UNIT](lab, system, _SHOWN, lab.scale.seeds[0]))
        rows.append(ImageRow(f"{name}, {UNIT}", samples.numpy()))
    smallest = sizes(systems[VAE, counts[0]][0].spec, lab.scale.seeds[:1])
    figures.image_rows(lab.out / "10-pictures.png", rows, note=smallest)
