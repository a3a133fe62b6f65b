"""Step 4: an encoder gives the code, and the code can be kept."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.figures_ladder import ImageRow
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.cache import system_key
from vaeserve_training.ladder.information import separability
from vaeserve_training.ladder.lab import Draw, Lab
from vaeserve_training.ladder.priors import unit_gaussian
from vaeserve_training.ladder.results import Claim, Findings, Picture, Table, ratios
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec, image_mse, intensity
from vaeserve_training.ladder.training import Trained
from vaeserve_training.ladder.wording import number, sizes

_SHOWN = 12
_GRID = 64
_OTHER_PROCESS_TIMEOUT_S = 300


class OtherProcessError(RuntimeError):
    """The process that was to decode saved codes failed."""


def autoencoder_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 4."""
    return [specs.autoencoder(scale, seed) for seed in scale.seeds]


def measure_autoencoder(lab: Lab) -> Findings:
    """Step 4: codes that an encoder gives, kept and decoded later."""
    runs, seeds = lab.per_seed(specs.autoencoder), lab.scale.seeds
    size = runs[0].system.latent_size
    test_mse = tuple(float(image_mse(run.system.reconstruct(lab.test_pixels), lab.test_pixels).mean()) for run in runs)
    train_mse = tuple(
        float(image_mse(run.system.reconstruct(lab.train_pixels), lab.train_pixels).mean()) for run in runs
    )
    components = principal_components_mse(lab.train_pixels, lab.test_pixels, size)
    later, difference = _decode_in_another_process(lab, runs[0])
    codes = [run.system.encode(lab.test_pixels) for run in runs]
    auc = tuple(
        separability(code, lab.noise(len(code), size, draw=Draw.PRIOR, seed=seed), seed=seed)
        for code, seed in zip(codes, seeds, strict=True)
    )
    samples = [
        run.system.decode(unit_gaussian(lab, run.system, lab.scale.samples, seed))
        for run, seed in zip(runs, seeds, strict=True)
    ]
    unseen = lab.test_pixels[: lab.scale.samples]
    of_samples = tuple(lab.fid(images) for images in samples)
    of_unseen = tuple(lab.fid(run.system.reconstruct(unseen)) for run in runs)
    made_with = sizes(
        runs[0].system.spec, seeds, f"{size} latents", f"FID-LeNet on {number(lab.scale.samples)} images a side"
    )
    _draw_autoencoder(lab, runs[0], later, samples[0], sizes(runs[0].system.spec, seeds[:1], f"{size} latents"))
    return Findings(
        sizes=made_with,
        claims=(
            Claim.at_most(
                "A code of an encoder holds images that it was not trained on, better than principal components do.",
                f"mean squared error of unseen images; the bound is that of {size} principal components",
                test_mse,
                components,
            ),
            Claim.at_most(
                "A saved code gives its image back later, in another process.",
                "largest difference of a pixel, on the scale 0..1",
                (difference,),
                1e-6,
            ),
            Claim.at_least(
                "Its codes are nothing like draws from the unit Gaussian.",
                "AUC of a classifier that tells codes of unseen images from N(0, I)",
                auc,
                0.9,
            ),
            Claim.at_least(
                "Asked to generate from the unit Gaussian, it fails.",
                "FID-LeNet of generated images as a multiple of that of reconstructions",
                ratios(of_samples, of_unseen),
                2.0,
            ),
        ),
        tables=(
            Table(
                title="Reconstruction and generation",
                columns=("figure", "value"),
                rows=(
                    ("mean squared error, training images", train_mse),
                    ("mean squared error, unseen images", test_mse),
                    (f"mean squared error of {size} principal components, unseen images", components),
                    ("standard deviation of a code's numbers", tuple(float(code.std(0).mean()) for code in codes)),
                    ("FID-LeNet of reconstructions of unseen images", of_unseen),
                    ("FID-LeNet of images from N(0, I)", of_samples),
                    ("FID-LeNet of the unseen images themselves (floor)", lab.floor.fid),
                ),
            ),
        ),
        pictures=(
            Picture(
                file="04-reconstructions.png",
                caption="Unseen images; what their codes decode to; the same codes, saved, decoded by another process.",
            ),
            Picture(file="04-samples.png", caption="What the decoder makes of codes, and of draws from N(0, I)."),
        ),
        remarks=(
            "From here on the encoder's input and the target are a Bernoulli sample of each image, so that this step "
            "and the next differ in the source of the code alone. Mean squared errors are against the grey image.",
        ),
    )


def principal_components_mse(train: Tensor, test: Tensor, components: int) -> float:
    """Return the mean squared error with which so many principal components of `train` hold `test`, both uint8."""
    flat = intensity(train).flatten(1).double()
    centre = flat.mean(0)
    _, vectors = torch.linalg.eigh((flat - centre).T @ (flat - centre))
    basis = vectors[:, -components:]
    unseen = intensity(test).flatten(1).double() - centre
    return float((unseen - unseen @ basis @ basis.T).square().mean())


def _decode_in_another_process(lab: Lab, run: Trained) -> tuple[NDArray[np.float32], float]:
    """Save codes of unseen images, decode them in a fresh process; return its images and their largest difference."""
    pixels = lab.test_pixels[:_SHOWN]
    codes, images = lab.out / "04-codes.npz", lab.out / "04-decoded.npz"
    np.savez(codes, codes=run.system.encode(pixels).numpy())
    system = lab.cache.path(system_key(run.system.spec, lab.data))
    command = [sys.executable, "-m", "vaeserve_training.ladder.decode", str(system), str(codes), str(images)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_OTHER_PROCESS_TIMEOUT_S, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise OtherProcessError(f"decoding saved codes in another process failed: {reason}")
    with np.load(images, allow_pickle=False) as arrays:
        later: NDArray[np.float32] = arrays["images"]
    return later, float(np.abs(later - run.system.reconstruct(pixels).numpy()).max())


def _draw_autoencoder(lab: Lab, run: Trained, later: NDArray[np.float32], samples: Tensor, made_with: str) -> None:
    pixels = lab.test_pixels[:_GRID]
    reconstructed = run.system.reconstruct(pixels).numpy()
    figures.image_rows(
        lab.out / "04-reconstructions.png",
        [
            ImageRow("unseen image", intensity(pixels[:_SHOWN]).numpy()),
            ImageRow("from its code", reconstructed[:_SHOWN]),
            ImageRow("another process", later),
        ],
        note=made_with,
    )
    figures.image_panels(
        lab.out / "04-samples.png",
        [("from codes of unseen images", reconstructed), ("from N(0, I)", samples[:_GRID].numpy())],
        columns=8,
        note=made_with,
    )
