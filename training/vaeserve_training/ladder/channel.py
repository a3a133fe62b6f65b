"""Step 8: information through a noisy number: two names stored at 5.43 and 5.44, and the latents of a VAE."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vaeserve_training import figures_ladder as figures
from vaeserve_training.figures_ladder import Panel, Series
from vaeserve_training.ladder import specs
from vaeserve_training.ladder.information import (
    bits,
    capacity_bits,
    channel_information,
    confusion_rate,
    gaussian_inputs,
    marginal_kl,
    mutual_information,
)
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.results import Claim, Findings, Picture, Table
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec
from vaeserve_training.ladder.training import Trained
from vaeserve_training.ladder.wording import number, sizes
from vaeserve_training.objectives import kl_divergence
from vaeserve_training.randomness import generator, seed_of

NAMES = (5.43, 5.44)
NOISE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
_NAME_DRAWS = 200_000
_GAUSSIAN_INPUTS = 500
_TOLERANCE = 1e-3  # of so many inputs in place of all, as a share of the capacity
_ROUNDING_BITS = 1e-9


@dataclass(frozen=True)
class _Channel:
    """A number sent through noise of one standard deviation."""

    stddev: float
    errors: float  # share of names taken for the other one, simulated
    best_errors: float  # the same in closed form
    capacity: float  # bits
    gaussian: float  # bits, Gaussian inputs
    names: float  # bits, the two names


@dataclass(frozen=True)
class _Latents:
    """A VAE's latents as such channels, (D,) each, in bits, by falling KL."""

    information: Tensor  # estimated
    standard_error: Tensor  # of that estimate
    kl: Tensor
    marginal_kl: Tensor
    capacity: Tensor

    @property
    def deviations(self) -> Tensor:
        """How far the estimate is from KL less marginal KL, which it is in theory, in its standard errors."""
        return (self.information - (self.kl - self.marginal_kl)) / self.standard_error.clamp(min=_ROUNDING_BITS)


def channel_systems(scale: Scale) -> list[Spec]:
    """Return the systems of step 8."""
    return [specs.variational_autoencoder(scale, seed) for seed in scale.seeds]


def measure_channel(lab: Lab) -> Findings:
    """Step 8: what can be told apart under noise, in error rates and in bits."""
    channels = [send_names(stddev) for stddev in NOISE]
    runs = lab.per_seed(specs.variational_autoencoder)
    latents = [_latents(lab, run, seed) for run, seed in zip(runs, lab.scale.seeds, strict=True)]
    of_channel = (
        f"{number(_NAME_DRAWS)} draws of two equally likely names, seed 0; {number(_GAUSSIAN_INPUTS)} Gaussian inputs"
    )
    posteriors, draws = number(len(lab.test_pixels)), number(lab.scale.draws)
    of_latents = f"{posteriors} posteriors of unseen images; {draws} draws for each latent"
    of_vae = sizes(runs[0].system.spec, lab.scale.seeds, of_latents)
    _draw_channel(lab, channels, of_channel)
    _draw_latents(lab, latents[0], sizes(runs[0].system.spec, lab.scale.seeds[:1], of_latents))
    return Findings(
        sizes=f"channel: {of_channel}; VAE: {of_vae}",
        claims=_claims(channels, latents),
        tables=(_channel_table(channels), _latent_table(latents, len(lab.test_pixels))),
        pictures=(
            Picture(file="08-names.png", caption="What arrives of each name, under little and under unit noise."),
            Picture(file="08-channel.png", caption="Errors, and bits against the capacity, by the level of noise."),
            Picture(file="08-latents.png", caption="Bits through each latent of the VAE."),
        ),
        remarks=(
            "To be told apart under unit noise, names must lie farther apart, and the KL to N(0, I) is what distance "
            "costs. A VAE spends that price where it tells the most images apart.",
        ),
    )


def _channel_table(channels: list[_Channel]) -> Table:
    return Table(
        title=f"Names at {NAMES[0]} and {NAMES[1]} under Gaussian noise",
        columns=(
            "stddev of the noise",
            "taken for the other",
            "the same, closed form",
            "capacity, bits",
            "Gaussian inputs, bits",
            "the names, bits",
        ),
        rows=tuple((f"{c.stddev:g}", c.errors, c.best_errors, c.capacity, c.gaussian, c.names) for c in channels),
        note="Capacity: 0.5 log2(1 + S/N), with S the variance of the two names. It is the bound for every input of "
        "that variance, and Gaussian inputs meet it; two names lie below it, and hold one bit at most: by little under "
        "much noise, where no input says more than its variance lets it. The last two columns are by quadrature.",
    )


def _latent_table(latents: list[_Latents], posteriors: int) -> Table:
    columns = (
        [one.information for one in latents],
        [one.standard_error for one in latents],
        [one.kl for one in latents],
        [one.marginal_kl for one in latents],
        [one.capacity for one in latents],
    )
    return Table(
        title="The VAE's latents as such channels, in bits",
        columns=(
            "latent",
            "information",
            "its standard error",
            "KL to N(0, 1)",
            "marginal KL",
            "capacity at mean noise",
        ),
        rows=tuple(
            (rank + 1, *(tuple(float(one[rank]) for one in column) for column in columns))
            for rank in range(len(latents[0].kl))
        ),
        note="By falling KL, which is information + marginal KL. Information of image and latent, estimated by draws "
        f"from {number(posteriors)} posteriors, and so at most log2 N = {math.log2(posteriors):.1f} bits; KL in closed "
        "form, marginal KL by quadrature. The capacity takes the mean squared noise for the noise of every image, so "
        "here it is a guide and no bound.",
    )


def send_names(stddev: float) -> _Channel:
    """Send the two names, and Gaussian numbers of the same variance, through noise of that standard deviation."""
    names = torch.tensor(NAMES, dtype=torch.float64)
    random = generator(0)
    sent = torch.randint(2, (_NAME_DRAWS,), generator=random)
    received = names[sent] + stddev * torch.randn(_NAME_DRAWS, generator=random, dtype=torch.float64)
    guessed = (received > names.mean()).long()
    signal = float(names.var(correction=0))
    return _Channel(
        stddev=stddev,
        errors=float((guessed != sent).double().mean()),
        best_errors=confusion_rate(NAMES[1] - NAMES[0], stddev),
        capacity=capacity_bits(signal / stddev**2),
        gaussian=bits(channel_information(gaussian_inputs(_GAUSSIAN_INPUTS, signal), stddev)),
        names=bits(channel_information(names, stddev)),
    )


def _latents(lab: Lab, run: Trained, seed: int) -> _Latents:
    mean, log_variance = lab.bound(run.system).posterior
    stddev = (0.5 * log_variance).exp()
    kl = kl_divergence(mean, log_variance).mean(0)
    order = kl.argsort(descending=True)
    # Each latent with draws of its own, or all of them would err to the same side.
    found = [
        mutual_information(mean[:, [latent]], stddev[:, [latent]], draws=lab.scale.draws, seed=seed_of(seed, latent))
        for latent in order.tolist()
    ]
    signal_to_noise = mean.var(0) / stddev.square().mean(0)
    return _Latents(
        information=bits(1) * torch.tensor([one.nats for one in found]),
        standard_error=bits(1) * torch.tensor([one.standard_error_nats for one in found]),
        kl=bits(1) * kl[order],
        marginal_kl=bits(1) * marginal_kl(mean, stddev)[order],
        capacity=torch.tensor([capacity_bits(float(ratio)) for ratio in signal_to_noise[order]]),
    )


def _claims(channels: list[_Channel], latents: list[_Latents]) -> tuple[Claim, ...]:
    unit, least = channels[-1], channels[0]
    return (
        Claim.at_least(
            f"Under unit noise, names at {NAMES[0]} and {NAMES[1]} cannot be told apart.",
            "share of names taken for the other one; 0.5 is guessing",
            (unit.errors,),
            0.49,
        ),
        Claim.at_most(
            f"Under noise of {least.stddev:g} they can.",
            "share of names taken for the other one",
            (least.errors,),
            1e-4,
        ),
        Claim.at_most(
            "No input says more than the capacity 0.5 log2(1 + S/N): the names stay below it at every level of noise.",
            "largest excess of the names' information over the capacity, in bits",
            (max(channel.names - channel.capacity for channel in channels),),
            _ROUNDING_BITS,
        ),
        Claim.at_most(
            "Gaussian inputs meet it.",
            "largest difference of their information from the capacity, as a share of it",
            (max(abs(channel.gaussian / channel.capacity - 1) for channel in channels),),
            _TOLERANCE,
        ),
        Claim.at_most(
            "A latent of the VAE says what it is charged for, its KL, less what its codes miss N(0, 1) by.",
            "largest difference of its information from KL less marginal KL, in standard errors",
            tuple(float(one.deviations.abs().max()) for one in latents),
            4.0,
        ),
    )


def _draw_channel(lab: Lab, channels: list[_Channel], made_with: str) -> None:
    of_densities = f"densities of what arrives of the names {NAMES[0]} and {NAMES[1]}, in closed form"
    figures.chart(lab.out / "08-names.png", [_densities(0.003), _densities(1.0)], note=of_densities)
    noise = [channel.stddev for channel in channels]
    shared = "standard deviation of the noise"
    figures.chart(
        lab.out / "08-channel.png",
        [
            Panel(
                x_label=shared,
                y_label="names taken for the other, share",
                series=[
                    Series("simulated", noise, [channel.errors for channel in channels]),
                    Series("closed form", noise, [channel.best_errors for channel in channels]),
                ],
                references=[("guessing", 0.5)],
                log_x=True,
            ),
            Panel(
                x_label=shared,
                y_label="bits per number",
                series=[
                    Series("capacity", noise, [channel.capacity for channel in channels]),
                    Series("Gaussian inputs", noise, [channel.gaussian for channel in channels]),
                    Series("the two names", noise, [channel.names for channel in channels]),
                ],
                log_x=True,
                log_y=True,
            ),
        ],
        note=made_with,
    )


def _draw_latents(lab: Lab, latents: _Latents, made_with: str) -> None:
    ranks = range(1, len(latents.kl) + 1)
    panel = Panel(
        x_label="latent, by falling KL",
        y_label="bits per image",
        series=[
            Series("KL to N(0, 1)", ranks, latents.kl.tolist()),
            Series("information, estimated", ranks, latents.information.tolist()),
            Series("capacity at mean noise", ranks, latents.capacity.tolist()),
        ],
    )
    figures.chart(lab.out / "08-latents.png", [panel], note=made_with)


def _densities(stddev: float) -> Panel:
    names = torch.tensor(NAMES, dtype=torch.float64)
    grid = torch.linspace(float(names[0]) - 4 * stddev, float(names[1]) + 4 * stddev, 400, dtype=torch.float64)
    return Panel(
        title=f"noise of {stddev:g}",
        x_label="number received",
        y_label="probability density",
        series=[Series(f"sent {name}", grid.tolist(), _density(grid, name, stddev).tolist()) for name in NAMES],
    )


def _density(grid: Tensor, centre: float, stddev: float) -> Tensor:
    return torch.exp(-0.5 * ((grid - centre) / stddev).square()) / (stddev * math.sqrt(2 * math.pi))
