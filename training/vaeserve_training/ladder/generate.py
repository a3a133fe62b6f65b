"""Step 6: sample the unit Gaussian, decode; which system's images are like the data, and are they new?"""

from __future__ import annotations

from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.figures_ladder import Bars, ImageRow
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.distances import Copies, nearest
from vaeserve_training.ladder.lab import Lab, Quality
from vaeserve_training.ladder.priors import FITTED, FLOW, PRIORS, UNIT
from vaeserve_training.ladder.results import Claim, Figures, Findings, Picture, Table, differences, ratios
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec, intensity
from vaeserve_training.ladder.training import Trained
from vaeserve_training.ladder.wording import number, sizes

AUTOENCODER = "autoencoder"
VAE = "VAE"
_MAKERS = {AUTOENCODER: specs.autoencoder, VAE: specs.variational_autoencoder}
_GRID = 64
_SHOWN = 12
_COPIES_BOUND = 0.1

Way = tuple[str, str]  # a system and the prior that its codes are drawn from


def generating_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 6."""
    return [make(scale, seed) for make in _MAKERS.values() for seed in scale.seeds]


def measure_generation(lab: Lab) -> Findings:
    """Step 6: images from draws, autoencoder against VAE."""
    samples = {
        (name, prior): _samples(lab, lab.per_seed(make), prior) for name, make in _MAKERS.items() for prior in PRIORS
    }
    quality = {way: [lab.quality(images) for images in of_way] for way, of_way in samples.items()}
    vae = lab.per_seed(specs.variational_autoencoder)
    unseen = lab.test_pixels[: lab.scale.samples]
    reconstructed = [lab.quality(run.system.reconstruct(unseen)) for run in vae]
    copied = {prior: [lab.copied(images) for images in samples[VAE, prior]] for prior in (UNIT, FLOW)}
    made_with = sizes(
        vae[0].system.spec,
        lab.scale.seeds,
        f"{vae[0].system.latent_size} latents",
        f"{number(lab.scale.samples)} images a side",
        f"flow of {lab.scale.prior.couplings} couplings, fitted for {number(lab.scale.prior.steps)} steps",
        f"classifier of {lab.classifier.accuracy(intensity(lab.test_pixels), lab.test_labels):.1%} accuracy",
    )
    one_seed = sizes(vae[0].system.spec, lab.scale.seeds[:1], f"{vae[0].system.latent_size} latents")
    rows = {f"{system}, {prior}": of_way for (system, prior), of_way in quality.items()}
    rows |= {"VAE, reconstructions of unseen images": reconstructed, "unseen images themselves (floor)": [lab.floor]}
    _draw(lab, samples, one_seed)
    _draw_quality(lab, rows, made_with)
    return Findings(
        sizes=made_with,
        claims=_claims(quality, copied[UNIT]),
        tables=(
            Table(
                title="Generated images against training images",
                columns=("images", "FID-LeNet", "precision", "core precision", "recall"),
                rows=tuple((name, *_columns(of_way)) for name, of_way in rows.items()),
                note="Lower FID-LeNet is better; its scale is this classifier's own. Precision: share of images that "
                "lie among real ones; core precision: the same without the tenth of the real images that are farthest "
                "from others; recall: share of real ones that lie among them (k = 3).",
            ),
            Table(
                title="Are the VAE's images new?",
                columns=("images", "estimated share of copies", "its standard error"),
                rows=tuple(
                    (
                        f"{VAE}, {prior}",
                        tuple(found.share for found in of_prior),
                        of_prior[0].standard_error,  # the same for every seed
                    )
                    for prior, of_prior in copied.items()
                ),
                note=f"From the share of images that are nearest to one of {number(len(lab.train_pixels))} training "
                f"images rather than to one of {number(len(lab.test_pixels))} unseen ones, and what it would be by "
                "chance. 0: no memory of the training images; 1: nothing but copies.",
            ),
        ),
        pictures=(
            Picture(file="06-samples.png", caption="Decoded draws from N(0, I)."),
            Picture(file="06-priors.png", caption="The same systems, drawn from a Gaussian fitted to their codes."),
            Picture(file="06-flow.png", caption="And from a flow fitted to them, as it is published with a bundle."),
            Picture(file="06-quality.png", caption="Distance, fidelity and coverage."),
            Picture(
                file="06-nearest.png", caption="Images that the VAE generated, each over its nearest training image."
            ),
        ),
        remarks=(
            "Every image is a decoder's mean, not a draw from its likelihood, so blur counts as distance to the data. "
            "Gaussian and flow are fitted in the same way for both systems, after training, to codes of the training "
            "images.",
        ),
    )


def _samples(lab: Lab, runs: list[Trained], prior: str) -> list[Tensor]:
    """Return the images of each seed's system, decoded from draws of that prior."""
    return [
        run.system.decode(PRIORS[prior](lab, run.system, lab.scale.samples, seed))
        for run, seed in zip(runs, lab.scale.seeds, strict=True)
    ]


def _columns(quality: list[Quality]) -> list[Figures]:
    return [tuple(column) for column in zip(*quality, strict=True)]


def _claims(quality: dict[Way, list[Quality]], copied: list[Copies]) -> tuple[Claim, ...]:
    def figures_of(system: str, name: str) -> Figures:
        return tuple(getattr(found, name) for found in quality[system, UNIT])

    return (
        Claim.at_most(
            "Decoded draws from the unit Gaussian are far nearer to the data from a VAE than from an autoencoder.",
            "FID-LeNet of the VAE's images as a multiple of the autoencoder's",
            ratios(figures_of(VAE, "fid"), figures_of(AUTOENCODER, "fid")),
            0.5,
        ),
        Claim.at_least(
            "More of the VAE's images lie among real ones.",
            "precision of the VAE's images less the autoencoder's",
            differences(figures_of(VAE, "precision"), figures_of(AUTOENCODER, "precision")),
            0.0,
            otherwise="An outlier among the real images reaches far, and images that are much alike all lie within its "
            "reach: core precision and recall, in the table below, tell how few real images they are like.",
        ),
        Claim.at_least(
            "The VAE's images cover more of the real ones.",
            "recall of the VAE's images less the autoencoder's",
            differences(figures_of(VAE, "recall"), figures_of(AUTOENCODER, "recall")),
            0.0,
        ),
        Claim.at_most(
            "The VAE's images from N(0, I) are nearer to the data than an autoencoder's from a fitted Gaussian.",
            "FID-LeNet of the VAE's images as a multiple of the autoencoder's",
            ratios(figures_of(VAE, "fid"), tuple(found.fid for found in quality[AUTOENCODER, FITTED])),
            1.0,
            otherwise="With a Gaussian fitted to its codes the plain autoencoder generates, too: what it lacked was to "
            "know where its codes are. A VAE's training settles that beforehand, if only roughly.",
        ),
        Claim.at_most(
            "A prior fitted to the VAE's codes, a flow, brings its images nearer to the data than N(0, I).",
            "FID-LeNet with the flow as a multiple of that with N(0, I)",
            ratios(tuple(found.fid for found in quality[VAE, FLOW]), figures_of(VAE, "fid")),
            1.0,
        ),
        Claim.at_most(
            "The VAE's images are new: they are no nearer to training images than to images that it never saw.",
            "estimated share of copies of training images, less two of its standard errors",
            tuple(found.share - 2 * found.standard_error for found in copied),
            _COPIES_BOUND,
        ),
    )


def _draw(lab: Lab, samples: dict[Way, list[Tensor]], note: str) -> None:
    for file, prior in (("06-samples.png", UNIT), ("06-priors.png", FITTED), ("06-flow.png", FLOW)):
        panels = [(f"{system}, {prior}", samples[system, prior][0][:_GRID].numpy()) for system in _MAKERS]
        figures.image_panels(lab.out / file, panels, columns=8, note=note)
    generated = samples[VAE, UNIT][0][:_SHOWN]
    train = intensity(lab.train_pixels)
    figures.image_rows(
        lab.out / "06-nearest.png",
        [
            ImageRow("generated", generated.numpy()),
            ImageRow("nearest training image", train[nearest(generated, train).row].numpy()),
        ],
        note=note,
    )


def _draw_quality(lab: Lab, rows: dict[str, list[Quality]], made_with: str) -> None:
    columns = {name: _columns(of_way) for name, of_way in rows.items()}
    figures.bar_chart(
        lab.out / "06-quality.png",
        list(rows),
        [
            Bars("distance to the data", "FID-LeNet (less is better)", [column[0] for column in columns.values()]),
            Bars("fidelity", "core precision (more is better)", [column[2] for column in columns.values()]),
            Bars("coverage", "recall (more is better)", [column[3] for column in columns.values()]),
        ],
        note=made_with,
    )
