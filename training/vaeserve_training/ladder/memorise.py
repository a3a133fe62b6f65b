"""Steps 1 to 3: a decoder that memorises, from a constant, from a place in a list, from a few real numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.figures_ladder import ImageRow, Panel, Series
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.codes import CodeName
from vaeserve_training.ladder.distances import nearest
from vaeserve_training.ladder.lab import Draw, Lab
from vaeserve_training.ladder.results import Claim, Figures, Findings, Picture, Table, ratios
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.specs import KNOWN_MSE
from vaeserve_training.ladder.systems import Spec, System, image_mse, intensity
from vaeserve_training.ladder.training import Trained
from vaeserve_training.ladder.wording import listed, number, sizes

CONSTANT_MSE = 1e-4
_SHOWN = 16
_PAIRS = 256
_UNSEEN = 8  # unseen codes of each kind, where there are so many

FIXED: CodeName = "fixed vectors"
LEARNED: CodeName = "learned vectors"
VectorRuns = dict[tuple[CodeName, int], list[Trained]]
VectorFigures = dict[tuple[CodeName, int], Figures]


def constant_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 1."""
    return [specs.constant(scale, seed) for seed in scale.seeds]


def measure_constant(lab: Lab) -> Findings:
    """Step 1: one image from a constant."""
    pixels = lab.train_pixels[:1]
    runs = [lab.trained(spec) for spec in constant_systems(lab.scale)]
    final = tuple(float(image_mse(run.system.reconstruct(pixels), pixels)) for run in runs)
    bias_alone = tuple(float(image_mse(run.system.decoder.output_bias.sigmoid()[None], pixels)) for run in runs)
    made_with = sizes(runs[0].system.spec, lab.scale.seeds)
    _draw_constant(lab, runs, made_with)
    return Findings(
        sizes=made_with,
        claims=(
            Claim.at_most(
                "A deconvolutional network whose input is always ones memorises one image.",
                "mean squared error after training",
                final,
                CONSTANT_MSE,
            ),
        ),
        tables=(
            Table(
                title="What of the network holds the image",
                columns=("part", "mean squared error"),
                rows=(("whole network", final), ("bias of the output alone", bias_alone)),
            ),
        ),
        pictures=(
            Picture(file="01-over-training.png", caption="What the constant decodes to, over training."),
            Picture(file="01-error.png", caption="Error over training, averaged from point to point."),
        ),
        remarks=("The input says nothing, so the image is in the weights: this network can draw one picture.",),
    )


def _draw_constant(lab: Lab, runs: list[Trained], made_with: str) -> None:
    pixels = lab.train_pixels[:1]
    steps = sorted(runs[0].snapshots)
    seen = [runs[0].at(step).reconstruct(pixels) for step in steps]
    one_seed = sizes(runs[0].system.spec, lab.scale.seeds[:1])
    figures.image_rows(
        lab.out / "01-over-training.png",
        [ImageRow("after step", torch.cat([*seen, intensity(pixels)]).numpy())],
        columns=[*(number(step) for step in steps), "image"],
        note=one_seed,
    )
    curves = [
        Series(f"seed {seed}", [record.step for record in run.history], [record.distortion for record in run.history])
        for run, seed in zip(runs, lab.scale.seeds, strict=True)
    ]
    panel = Panel(
        x_label="optimiser step",
        y_label="mean squared error",
        series=curves,
        references=[("claimed", CONSTANT_MSE)],
        log_x=True,
        log_y=True,
    )
    figures.chart(lab.out / "01-error.png", [panel], note=made_with)


def one_hot_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 2."""
    return [specs.one_hot(scale, images, seed) for images in scale.one_hot_images for seed in scale.seeds]


def measure_one_hot(lab: Lab) -> Findings:
    """Step 2: n images from their places in a list."""
    counts, seeds = lab.scale.one_hot_images, lab.scale.seeds
    runs = {n: [lab.trained(specs.one_hot(lab.scale, n, seed)) for seed in seeds] for n in counts}
    worst = {n: tuple(float(_errors(run.system, lab.train_pixels[:n]).max()) for run in runs[n]) for n in counts}
    steps = {n: tuple(float(run.steps) for run in runs[n]) for n in counts}
    unseen = _unseen_distances(lab, runs[counts[-1]])
    made_with = sizes(
        runs[counts[-1]][0].system.spec,
        seeds,
        "training stops as soon as every image is known",
        images=f"{listed(counts)} training images",
    )
    _draw_one_hot(lab, runs[counts[-1]][0].system, steps, made_with)
    memorised = tuple(
        Claim.at_most(
            f"One-hot input memorises {n} image{'s' * (n > 1)}.",
            "mean squared error of the worst image",
            worst[n],
            KNOWN_MSE,
        )
        for n in counts
    )
    return Findings(
        sizes=made_with,
        claims=(
            *memorised,
            Claim.at_least(
                "A place that was never used gives none of the memorised images.",
                f"mean squared error to the nearest of {counts[-1]} images",
                unseen["the unused place"],
                10 * KNOWN_MSE,
            ),
        ),
        tables=(
            Table(
                title="Steps until every image is known",
                columns=("images", "optimiser steps", "mean squared error of the worst image"),
                rows=tuple((n, steps[n], worst[n]) for n in counts),
            ),
            Table(
                title=f"Codes that no image was given, {counts[-1]} images",
                columns=("code", "mean squared error to the nearest memorised image"),
                rows=tuple(unseen.items()),
                note=f"Averages over up to {_UNSEEN} codes of each kind.",
            ),
        ),
        pictures=(
            Picture(file="02-memorised.png", caption=f"Up to {_SHOWN} of the images, and what their codes decode to."),
            Picture(file="02-steps.png", caption=f"Optimiser steps until no image's error is above {KNOWN_MSE:g}."),
            Picture(file="02-unseen.png", caption="What codes that belong to no image decode to."),
        ),
        remarks=(
            "A place in a list has no neighbours: nothing says what lies between two places, or in an unused one.",
        ),
    )


def _unseen_codes(lab: Lab, images: int, seed: int) -> dict[str, Tensor]:
    """Return codes (K, D) that no image was given, by kind."""
    identity = torch.eye(images + 1)
    first, second = lab.pairs(_UNSEEN, max(images, 2), seed=seed)
    return {
        "the unused place": identity[-1:],
        "no place at all (zeros)": torch.zeros(1, images + 1),
        "half of one place, half of another": (identity[first] + identity[second]) / 2,
        "random numbers, N(0, I)": lab.noise(_UNSEEN, images + 1, draw=Draw.PRIOR, seed=seed),
    }


def _unseen_distances(lab: Lab, runs: list[Trained]) -> dict[str, Figures]:
    """Return, by kind of unseen code, the mean squared error of its images to the nearest memorised one."""
    found: dict[str, Figures] = {}
    for run, seed in zip(runs, lab.scale.seeds, strict=True):
        memorised = intensity(lab.train_pixels[: run.system.spec.images])
        for kind, codes in _unseen_codes(lab, len(memorised), seed).items():
            distance = float(nearest(run.system.decode(codes), memorised).mse.mean())
            found[kind] = (*found.get(kind, ()), distance)
    return found


def _draw_one_hot(lab: Lab, system: System, steps: dict[int, Figures], made_with: str) -> None:
    pixels = lab.train_pixels[: system.spec.images]
    shown = sizes(system.spec, lab.scale.seeds[:1])
    figures.image_rows(
        lab.out / "02-memorised.png",
        [
            ImageRow("image", intensity(pixels[:_SHOWN]).numpy()),
            ImageRow("memorised", system.reconstruct(pixels)[:_SHOWN].numpy()),
        ],
        note=shown,
    )
    unseen = _unseen_codes(lab, len(pixels), lab.scale.seeds[0])
    rows = [ImageRow(kind, system.decode(codes).numpy()) for kind, codes in unseen.items()]
    figures.image_rows(lab.out / "02-unseen.png", rows, note=shown)
    panel = Panel(
        x_label="number of images",
        y_label="optimiser steps",
        series=[Series.over_seeds("", list(steps), list(steps.values()))],
        log_x=True,
        log_y=True,
        x_ticks=list(steps),
    )
    figures.chart(lab.out / "02-steps.png", [panel], note=made_with)


def vector_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 3."""
    return [
        specs.vectors(scale, codes, size, seed)
        for size in scale.vector_sizes
        for codes in (FIXED, LEARNED)
        for seed in scale.seeds
    ]


def measure_vectors(lab: Lab) -> Findings:
    """Step 3: the same images from a few real numbers, drawn or learned."""
    images, dimensions, seeds = lab.scale.one_hot_images[-1], lab.scale.vector_sizes, lab.scale.seeds
    pixels = lab.train_pixels[:images]
    runs: VectorRuns = {
        (codes, size): [lab.trained(specs.vectors(lab.scale, codes, size, seed)) for seed in seeds]
        for size in dimensions
        for codes in (FIXED, LEARNED)
    }
    errors: VectorFigures = {key: tuple(float(_errors(run.system, pixels).mean()) for run in runs[key]) for key in runs}
    between: VectorFigures = {key: tuple(_midpoint_distance(lab, run, pixels) for run in runs[key]) for key in runs}
    made_with = sizes(runs[FIXED, dimensions[-1]][0].system.spec, seeds)
    _draw_vectors(lab, runs, errors, between, made_with)
    unseen = float(nearest(intensity(lab.test_pixels[:_PAIRS]), intensity(pixels)).mse.mean())
    return Findings(
        sizes=made_with,
        claims=_vector_claims(errors, between, dimensions, images),
        tables=(
            Table(
                title="Mean squared errors at equal training",
                columns=(
                    "numbers in the code",
                    "fixed: images",
                    "learned: images",
                    "fixed: midpoints to the nearest image",
                    "learned: midpoints to the nearest image",
                ),
                rows=tuple(
                    (size, errors[FIXED, size], errors[LEARNED, size], between[FIXED, size], between[LEARNED, size])
                    for size in dimensions
                ),
                note=f"Midpoints of {_PAIRS} random pairs of codes. For comparison: real digits that are none of these "
                f"{images} are {unseen:.4f} from the nearest of them.",
            ),
        ),
        pictures=(
            Picture(file="03-dimension.png", caption="Errors and midpoints against the dimension of the code."),
            Picture(file="03-midpoints.png", caption="Pairs of images, and what lies midway between their codes."),
        ),
        remarks=(
            f"A few real numbers do nearly the work of step 2's {number(images + 1)} places. But nothing in the loss "
            "says what should lie between the codes: midpoints are none of the images; pictures show what they are.",
        ),
    )


def _vector_claims(
    errors: VectorFigures, between: VectorFigures, dimensions: tuple[int, ...], images: int
) -> tuple[Claim, ...]:
    smallest, largest = dimensions[0], dimensions[-1]
    per_dimension = [ratios(errors[LEARNED, size], errors[FIXED, size]) for size in dimensions]
    return (
        Claim.at_most(
            "More numbers in the code hold the images better.",
            f"error with {largest} learned numbers as a multiple of that with {smallest}",
            ratios(errors[LEARNED, largest], errors[LEARNED, smallest]),
            0.5,
        ),
        Claim.at_most(
            "Learned codes hold them better than arbitrary ones, at every dimension and equal training.",
            "error of learned codes as a multiple of that of fixed ones, at the worst dimension",
            tuple(max(of_seed) for of_seed in zip(*per_dimension, strict=True)),
            1.0,
        ),
        Claim.at_least(
            "Midway between two codes lies an image that is none of the memorised ones.",
            f"mean squared error of midpoints to the nearest of {images} images, {largest} learned numbers",
            between[LEARNED, largest],
            10 * KNOWN_MSE,
        ),
    )


def _midpoint_distance(lab: Lab, run: Trained, pixels: Tensor) -> float:
    """Return the mean squared error of decoded midpoints to their nearest training images."""
    codes = run.system.encode(pixels)
    first, second = lab.pairs(_PAIRS, len(pixels), seed=run.system.spec.config.run.seed)
    return float(nearest(run.system.decode((codes[first] + codes[second]) / 2), intensity(pixels)).mse.mean())


def _draw_vectors(lab: Lab, runs: VectorRuns, errors: VectorFigures, between: VectorFigures, made_with: str) -> None:
    dimensions = list(lab.scale.vector_sizes)
    panels = [
        Panel(
            title=title,
            x_label="numbers in the code",
            y_label="mean squared error",
            series=[
                Series.over_seeds(codes, dimensions, [values[codes, size] for size in dimensions])
                for codes in (FIXED, LEARNED)
            ],
            log_x=True,
            log_y=True,
            x_ticks=dimensions,
        )
        for title, values in (("memorised images", errors), ("midpoints to the nearest image", between))
    ]
    figures.chart(lab.out / "03-dimension.png", panels, note=made_with)
    pixels = lab.train_pixels[: lab.scale.one_hot_images[-1]]
    first, second = lab.pairs(12, len(pixels), seed=lab.scale.seeds[0])
    rows = [ImageRow("one image", intensity(pixels[first]).numpy())]
    for codes in (FIXED, LEARNED):
        for size in (dimensions[1], dimensions[-1]):
            system = runs[codes, size][0].system
            code = system.encode(pixels)
            rows.append(ImageRow(f"{codes}, {size} numbers", system.decode((code[first] + code[second]) / 2).numpy()))
    rows.append(ImageRow("the other", intensity(pixels[second]).numpy()))
    shown = sizes(runs[LEARNED, dimensions[-1]][0].system.spec, lab.scale.seeds[:1])
    figures.image_rows(lab.out / "03-midpoints.png", rows, note=shown)


def _errors(system: System, pixels: Tensor) -> Tensor:
    return image_mse(system.reconstruct(pixels), pixels)
