"""Step 11: how well it works on the data set: over training, over the plane of two latents, and between images."""

from __future__ import annotations

import torch
from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.figures_ladder import ImageRow, Panel, Series
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.priors import unit_gaussian
from vaeserve_training.ladder.results import Claim, Figures, Findings, Picture, Table, ratios
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec, System, intensity
from vaeserve_training.ladder.training import Trained
from vaeserve_training.ladder.wording import number, sizes

_SHOWN = 12
_MANIFOLD = 16  # images along each side
_WAYS = 8  # interpolations
_STEPS = 11  # images on each


def showcase_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 11."""
    makers = (specs.variational_autoencoder, specs.two_latents)
    return [make(scale, seed) for make in makers for seed in scale.seeds]


def measure_showcase(lab: Lab) -> Findings:
    """Step 11: figures and pictures of the finished VAE and of its way there."""
    runs, plane = lab.per_seed(specs.variational_autoencoder), lab.per_seed(specs.two_latents)
    steps = [*sorted(runs[0].snapshots), runs[0].steps]
    systems = {step: [run.system if step == run.steps else run.at(step) for run in runs] for step in steps}
    neg_elbo = {step: tuple(lab.bound(system).neg_elbo for system in systems[step]) for step in steps}
    fid = {step: _sample_fid(lab, systems[step]) for step in steps}
    last = steps[-1]
    path_fid = tuple(
        _interpolation_fid(lab, system, seed) for system, seed in zip(systems[last], lab.scale.seeds, strict=True)
    )
    size = runs[0].system.latent_size
    made_with = sizes(
        runs[0].system.spec,
        lab.scale.seeds,
        f"{size} latents",
        f"{number(len(lab.test_pixels))} unseen images",
        f"FID-LeNet on {number(lab.scale.samples)} images a side",
    )
    one_seed = sizes(runs[0].system.spec, lab.scale.seeds[:1], f"{size} latents")
    _draw(lab, {step: of_step[0] for step, of_step in systems.items()}, plane[0], one_seed)
    _draw_curves(lab, neg_elbo, fid, made_with)
    return Findings(
        sizes=made_with,
        claims=(
            Claim.at_most(
                "It models unseen digits well, for its size and training.",
                "-ELBO of unseen images in nats",
                neg_elbo[last],
                lab.scale.neg_elbo_bound_nats,
            ),
            Claim.at_most(
                "Its samples come nearer to the data as training goes on.",
                f"FID-LeNet of samples at the end as a multiple of that after {number(steps[1])} steps",
                ratios(fid[last], fid[steps[1]]),
                0.5,
            ),
            Claim.at_most(
                "What lies between two digits is as good as its samples.",
                "FID-LeNet of images midway between unseen ones as a multiple of that of samples",
                ratios(path_fid, fid[last]),
                1.0,
            ),
        ),
        tables=(
            Table(
                title="Over training",
                columns=("step", "-ELBO of unseen images, nats", "FID-LeNet of samples"),
                rows=tuple((step, neg_elbo[step], fid[step]) for step in steps),
                note=f"Dynamic binarisation with a fixed seed. FID-LeNet of real unseen images: {lab.floor.fid:.2f}.",
            ),
            Table(
                title="A VAE with two latents",
                columns=("-ELBO of unseen images, nats", "rate, nats"),
                rows=(
                    (
                        tuple(lab.bound(run.system).neg_elbo for run in plane),
                        tuple(float(lab.bound(run.system).rate.mean()) for run in plane),
                    ),
                ),
            ),
        ),
        pictures=(
            Picture(file="11-reconstructions.png", caption="Unseen images, and their reconstructions over training."),
            Picture(file="11-samples.png", caption="The same draws from N(0, I), decoded over training."),
            Picture(file="11-curves.png", caption="Bound and samples over training."),
            Picture(
                file="11-manifold.png", caption="The plane of a VAE with two latents, at equal steps of probability."
            ),
            Picture(file="11-interpolation.png", caption="On straight lines between the codes of unseen images."),
        ),
    )


def _sample_fid(lab: Lab, systems: list[System]) -> Figures:
    return tuple(
        lab.fid(system.decode(unit_gaussian(lab, system, lab.scale.samples, seed)))
        for system, seed in zip(systems, lab.scale.seeds, strict=True)
    )


def _interpolation_fid(lab: Lab, system: System, seed: int) -> float:
    codes = system.encode(lab.test_pixels)
    first, second = lab.pairs(lab.scale.samples, len(codes), seed=seed)
    return lab.fid(system.decode((codes[first] + codes[second]) / 2))


def manifold(system: System, side: int) -> Tensor:
    """Return side x side images whose two latents are at equal steps of N(0, 1)'s cumulative probability.

    Kingma and Welling 2014, figure 4: the inverse of the cumulative distribution at the centres of equal shares.
    """
    shares = (torch.arange(side) + 0.5) / side
    places = torch.special.ndtri(shares)
    rows, columns = torch.meshgrid(places.flip(0), places, indexing="ij")
    return system.decode(torch.stack([columns.flatten(), rows.flatten()], dim=1))


def _draw(lab: Lab, over_training: dict[int, System], plane: Trained, made_with: str) -> None:
    pixels = lab.test_pixels[:_SHOWN]
    names = {step: f"step {number(step)}" for step in over_training}
    reconstructed = [
        ImageRow(names[step], system.reconstruct(pixels).numpy()) for step, system in over_training.items()
    ]
    original = ImageRow("unseen image", intensity(pixels).numpy())
    figures.image_rows(lab.out / "11-reconstructions.png", [original, *reconstructed], note=made_with)
    sampled = [
        ImageRow(names[step], system.decode(unit_gaussian(lab, system, _SHOWN, lab.scale.seeds[0])).numpy())
        for step, system in over_training.items()
    ]
    figures.image_rows(lab.out / "11-samples.png", sampled, note=made_with)
    plane_sizes = sizes(plane.system.spec, lab.scale.seeds[:1], "2 latents")
    grid = manifold(plane.system, _MANIFOLD).numpy()
    reach = float(torch.special.ndtri(torch.tensor(1 - 0.5 / _MANIFOLD)))
    title = f"first latent to the right, second upwards, each from {-reach:.2f} to {reach:.2f}"
    figures.image_panels(lab.out / "11-manifold.png", [(title, grid)], columns=_MANIFOLD, note=plane_sizes, gap_px=0)
    system = list(over_training.values())[-1]
    codes = system.encode(lab.test_pixels)
    first, second = lab.pairs(_WAYS, len(codes), seed=lab.scale.seeds[0])
    share = torch.linspace(0, 1, _STEPS)[:, None]
    rows = []
    for start, end in zip(first.tolist(), second.tolist(), strict=True):
        between = system.decode(codes[start] + share * (codes[end] - codes[start]))
        ends = intensity(lab.test_pixels[[start, end]])
        rows.append(ImageRow("", torch.cat([ends[:1], between, ends[1:]]).numpy()))
    columns = ["image", *(f"{part:.1f}" for part in share.flatten().tolist()), "image"]
    figures.image_rows(lab.out / "11-interpolation.png", rows, columns=columns, note=made_with)


def _draw_curves(lab: Lab, neg_elbo: dict[int, Figures], fid: dict[int, Figures], made_with: str) -> None:
    steps = [step for step in neg_elbo if step > 0]  # a logarithmic axis has no zero
    figures.chart(
        lab.out / "11-curves.png",
        [
            Panel(
                x_label="optimiser step",
                y_label=y_label,
                series=[Series.over_seeds("", steps, [values[step] for step in steps])],
                references=references,
                log_x=True,
                log_y=log_y,
            )
            for y_label, values, references, log_y in (
                ("-ELBO of unseen images, nats", neg_elbo, [], False),
                ("FID-LeNet of samples", fid, [("real images", lab.floor.fid)], True),
            )
        ],
        note=made_with,
    )
