"""The one training loop of the ladder: a code for every image, an image from every code, the loss of objectives.py.

It differs from `trainer.py` in that codes need not come from an encoder, and in what it keeps for the pictures: the
loss along the way and the weights at chosen steps. A run is short, so it is not resumed but kept whole (`cache.py`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vaeserve_training import objectives
from vaeserve_training.compute import autocast, choose_device, cpu_threads, place
from vaeserve_training.convolutions import FastConvolutions
from vaeserve_training.data import ImageData
from vaeserve_training.ladder.systems import Spec, System, build
from vaeserve_training.optimiser import learning_rate, make_average, make_optimiser, rate_weight, update_average
from vaeserve_training.randomness import Stream, generator
from vaeserve_training.trainer import DivergedError

_RECORDS = 60  # points of a loss curve, at geometrically growing distances
_WORST_MSE_EVERY = 10  # steps between two looks at the worst image

Advance = Callable[[int], None]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Record:
    """Means over the steps since the last record, up to step `step`; the distortion is in the likelihood's unit."""

    step: int
    distortion: float
    rate_nats: float


@dataclass(frozen=True)
class Trained:
    """A trained system, on the CPU and in evaluation mode, and what was seen on the way."""

    system: System
    steps: int
    seconds: float
    history: tuple[Record, ...]
    snapshots: dict[int, Weights] = field(default_factory=dict)

    def at(self, step: int) -> System:
        """Return the system as it was after `step` steps, one of the spec's snapshots."""
        earlier = copy.deepcopy(self.system)
        earlier.load_state_dict(self.snapshots[step])
        return earlier


def train(spec: Spec, data: ImageData, *, device: str = "auto", advance: Advance | None = None) -> Trained:
    """Train the spec's system on the first `spec.images` training images.

    `advance` is told the steps that are done with, those that an early stop spares included. Raises DivergedError if
    the loss is no longer finite.
    """
    started_s = time.perf_counter()
    run = _Run(spec, data, choose_device(device))
    run.keep_snapshot()
    with cpu_threads(1):  # the networks are too small to share; see workshop.py
        for rows in _batches(spec, run.pixels.device):
            run.step(rows)
            run.keep_snapshot()
            if advance:
                advance(1)
            if run.knows_every_image():
                break
    if advance:
        advance(run.total_steps - run.steps)
    return Trained(
        system=run.averaged.cpu().eval().requires_grad_(False),
        steps=run.steps,
        seconds=time.perf_counter() - started_s,
        history=tuple(run.history),
        snapshots=run.snapshots,
    )


def total_steps(spec: Spec) -> int:
    """Return the number of optimiser steps that the spec asks for, at most."""
    return math.ceil(spec.images / spec.config.optimiser.batch_size) * spec.config.optimiser.epochs


def _batches(spec: Spec, device: torch.device) -> Iterator[Tensor]:
    """Yield the numbers of the images of each step, (N,)."""
    optimiser, seed = spec.config.optimiser, spec.config.run.seed
    for epoch in range(optimiser.epochs):
        order = torch.randperm(spec.images, generator=generator(seed, Stream.SHUFFLE, epoch))
        yield from torch.split(order.to(device), optimiser.batch_size)


class _Run:
    """A system on its way, and what is noted of it."""

    def __init__(self, spec: Spec, data: ImageData, device: torch.device) -> None:
        self.spec = spec
        self.config = spec.config
        self.device = device
        self.pixels = place(data.train[: spec.images], device)
        self.system = build(spec, data).to(device).train()
        self.average = make_average(self.config.optimiser, self.system)
        self.optimiser = make_optimiser(self.config.optimiser, self.system)
        self.random = generator(self.config.run.seed, Stream.TRAINING, device=device)
        self.total_steps = total_steps(spec)
        self.steps = 0
        self.history: list[Record] = []
        self.snapshots: dict[int, Weights] = {}
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # distortion and rate since the last record
        self.record_after = _spread_geometrically(self.total_steps)

    @property
    def averaged(self) -> System:
        """The system that is kept: with averaged weights, where the optimiser's configuration asks for them."""
        return self.system if self.average is None else self.average

    def step(self, rows: Tensor) -> None:
        """Take one optimiser step on the images with these numbers, (N,)."""
        config, likelihood = self.config, self.config.objective.likelihood
        pixels = self.pixels[rows].to(self.device)  # (N, C, H, W)
        uniform = None if likelihood == "mse" else torch.rand(pixels.shape, generator=self.random, device=self.device)
        noise = torch.randn((len(rows), self.system.latent_size), generator=self.random, device=self.device)
        observation = objectives.observe(pixels, uniform, likelihood)
        with FastConvolutions(), autocast(config.run, self.device):
            code = self.system.code(observation.encoder_input, rows, noise)
            distortion = objectives.distortion(self.system, code.latent, observation.target, likelihood)
        loss = (distortion + rate_weight(config.objective, self.steps) * code.rate).mean()
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.system.parameters(), config.optimiser.max_grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config.optimiser, self.steps, self.total_steps)
        self.optimiser.step()
        if self.average is not None:
            update_average(config.optimiser, self.average, self.system, self.steps)
        self.sums += torch.stack([distortion.detach().mean(), code.rate.detach().mean()]).double()
        self.steps += 1
        if self.steps in self.record_after:
            self._record()

    def _record(self) -> None:
        before = self.history[-1].step if self.history else 0
        distortion, rate = (self.sums / (self.steps - before)).tolist()
        if not math.isfinite(distortion + rate):
            raise DivergedError(
                f"the loss of a system with codes from {self.spec.codes!r} became infinite or not a number by step "
                f"{self.steps}; lower its learning rate ({self.config.optimiser.learning_rate:g})"
            )
        self.history.append(Record(self.steps, distortion, rate))
        self.sums.zero_()

    def keep_snapshot(self) -> None:
        """Keep a copy of the weights if the spec asks for this step's."""
        if self.steps in self.spec.snapshots:
            state = self.averaged.state_dict()
            self.snapshots[self.steps] = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def knows_every_image(self) -> bool:
        """Return whether the worst image is good enough to stop; never so if the spec sets no such bound."""
        if self.spec.worst_mse is None or self.steps % _WORST_MSE_EVERY:
            return False
        rows = torch.arange(self.spec.images, device=self.pixels.device)
        still = torch.zeros(len(rows), self.system.latent_size, device=self.device)
        image = self.pixels.to(self.device).float() / 255
        code = self.averaged.code(image, rows, still)
        mse = objectives.mean_squared_error(self.averaged.decoder(code.latent), image)
        return float(mse.max()) <= self.spec.worst_mse


def _spread_geometrically(total: int) -> set[int]:
    """Return up to _RECORDS step numbers from 1 to `total`, ever farther apart."""
    return {round(total ** (point / _RECORDS)) for point in range(_RECORDS + 1)}
