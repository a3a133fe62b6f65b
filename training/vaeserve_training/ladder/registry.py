"""The steps of the ladder: what each is, which systems it trains, how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vaeserve_training.ladder import (
    autoencode,
    channel,
    efficiency,
    generalise,
    generate,
    memorise,
    showcase,
    tradeoff,
    variational,
)
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.results import Findings
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec


@dataclass(frozen=True)
class Step:
    """One step."""

    number: int
    title: str
    codes: str
    """Where the decoder's input comes from, in a sentence."""
    systems: Callable[[Scale], list[Spec]]
    measure: Callable[[Lab], Findings]
    measure_s: int
    """Seconds that measuring and drawing take for each seed on two quiet CPU cores."""
    classifier: bool = False
    """Whether it compares images in the classifier's feature space."""


STEPS: dict[int, Step] = {
    step.number: step
    for step in (
        Step(
            number=1,
            title="One image from a constant",
            codes="The code is all ones, whatever the image.",
            systems=memorise.constant_systems,
            measure=memorise.measure_constant,
            measure_s=1,
        ),
        Step(
            number=2,
            title="Several images from a one-hot input",
            codes="The code has a one in the image's own place and zeros elsewhere; one place is never used.",
            systems=memorise.one_hot_systems,
            measure=memorise.measure_one_hot,
            measure_s=2,
        ),
        Step(
            number=3,
            title="Real-valued codes",
            codes="The code is a vector of a few real numbers, drawn once from N(0, I) or learned with the decoder.",
            systems=memorise.vector_systems,
            measure=memorise.measure_vectors,
            measure_s=3,
        ),
        Step(
            number=4,
            title="A standard autoencoder",
            codes="The code is what an encoder makes of the image, without noise; nothing is asked of the codes.",
            systems=autoencode.autoencoder_systems,
            measure=autoencode.measure_autoencoder,
            measure_s=15,
            classifier=True,
        ),
        Step(
            number=5,
            title="The variational autoencoder",
            codes="The code is a draw from the Gaussian that the encoder gives, and its KL to N(0, I) is charged for.",
            systems=variational.variational_systems,
            measure=variational.measure_variational,
            measure_s=8,
        ),
        Step(
            number=6,
            title="Generation: sample the unit Gaussian, decode",
            codes="To generate, the code is a draw from a prior and no encoder is needed.",
            systems=generate.generating_systems,
            measure=generate.measure_generation,
            measure_s=60,
            classifier=True,
        ),
        Step(
            number=7,
            title="Accuracy against closeness to the unit Gaussian",
            codes="The code is the encoder's draw; the rate weighs beta.",
            systems=tradeoff.swept_systems,
            measure=tradeoff.measure_tradeoff,
            measure_s=30,
        ),
        Step(
            number=8,
            title="Information through a noisy number",
            codes="The code is one number with noise on it; then each latent of the VAE, seen as such a number.",
            systems=channel.channel_systems,
            measure=channel.measure_channel,
            measure_s=30,
        ),
        Step(
            number=9,
            title="Efficient codes have standard deviations near one",
            codes="The code is the encoder's draw; here are its standard deviations, latent by latent.",
            systems=tradeoff.swept_systems,
            measure=efficiency.measure_efficiency,
            measure_s=8,
        ),
        Step(
            number=10,
            title="Does the constraint improve generalisation?",
            codes="The code is the encoder's, with noise and without, trained on ever more images.",
            systems=generalise.growing_systems,
            measure=generalise.measure_generalisation,
            measure_s=45,
            classifier=True,
        ),
        Step(
            number=11,
            title="How well it works",
            codes="The code is the encoder's draw, with all latents, and with two that fit on a page.",
            systems=showcase.showcase_systems,
            measure=showcase.measure_showcase,
            measure_s=15,
            classifier=True,
        ),
    )
}
