"""One training run in this process: the steps, and what surrounds an epoch.

Exactness rests on three things: every random number is a function of (seed, epoch, step), the learning rate is a
function of the step, and a checkpoint holds everything else.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vaeserve_training import atomic, checkpoint, metrics, objectives
from vaeserve_training.board import PICTURES, Board
from vaeserve_training.checkpoint import DatasetInfo, Progress
from vaeserve_training.compute import autocast, choose_device, describe_environment, place
from vaeserve_training.config import TrainConfig
from vaeserve_training.convolutions import FastConvolutions
from vaeserve_training.data import ImageData
from vaeserve_training.evaluate import bound, optimal_sigma
from vaeserve_training.models import Vae, build
from vaeserve_training.optimiser import learning_rate, make_average, make_optimiser, rate_weight, update_average
from vaeserve_training.progress import Bar
from vaeserve_training.randomness import Stream, generator, seed_of

SIGMA_IMAGES = 10_000  # training images whose error gives the optimal sigma after each epoch
_CHECK_STEPS_ON_GPU = 50  # reading a figure back makes the GPU wait, so it is not done at every step

logger = logging.getLogger(__name__)


class FitError(RuntimeError):
    """Training that cannot start or go on. The message says why and what to do."""


class DivergedError(FitError):
    """The loss or its gradient became infinite or not a number."""


class Trainer:
    """One run in this process: the model, its optimiser, and where in the data it is."""

    def __init__(self, config: TrainConfig, run_dir: Path, data: ImageData) -> None:
        self.config = config
        self.board: Board | None = None
        self.run_dir = run_dir
        self.data = data
        self.device = choose_device(config.run.device)
        self.images = place(data.train, self.device)
        self.vae = self._build().to(self.device)
        self.ema = make_average(config.optimiser, self.vae)
        self.optimiser = make_optimiser(config.optimiser, self.vae)
        self.steps_per_epoch = math.ceil(len(data.train) / config.optimiser.batch_size)
        self.total_steps = self.steps_per_epoch * config.optimiser.epochs
        self.environment = describe_environment(self.device)
        self.dataset = DatasetInfo(data.name, data.sha256, len(data.train), len(data.test), data.binarised)
        self.progress = Progress()
        # Sums over the epoch's images of loss, distortion and rate, then over its steps of the gradient's norm.
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.device)

    @property
    def averaged(self) -> Vae:
        """The model that is evaluated and exported."""
        return self.vae if self.ema is None else self.ema

    def start(self, header: checkpoint.Header | None) -> None:
        """Take up the state of a checkpoint, or that of a new run."""
        checkpoint.remove_leftovers(self.run_dir)
        if header is not None:
            self._restore(header)
        atomic.write_file(self.run_dir / checkpoint.CONFIG, self.config.to_json().encode())
        metrics.truncate(self.run_dir / metrics.FILE, self.progress.epoch)

    def _build(self) -> Vae:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.config.run.seed, Stream.WEIGHTS))
            return build(self.config, self.data.train.mean(axis=0) / 255)

    def _restore(self, header: checkpoint.Header) -> None:
        if header.dataset.sha256 != self.data.sha256:
            raise FitError(
                f"{header.path} was trained on images with SHA-256 {header.dataset.sha256}; those found now have "
                f"{self.data.sha256}: bring back the same images, or choose another run folder"
            )
        checkpoint.restore(header.path, vae=self.vae, ema=self.ema, optimiser=self.optimiser)
        self.progress = header.progress
        if header.progress.totals:
            self.totals.copy_(torch.tensor(header.progress.totals, dtype=torch.float64))
        then, now = header.environment, self.environment
        changed = [f"{key} was {then.get(key)}, is {now[key]}" for key in now if now[key] != then.get(key)]
        if changed:
            logger.warning("not bit-identical to a run that was never interrupted: %s", "; ".join(changed))

    def run_epoch(self, bar: Bar, interrupted: threading.Event) -> bool:
        """Go through the rest of the epoch; return False if `interrupted` was set before its end."""
        epoch = self.progress.epoch
        order = torch.randperm(len(self.images), generator=generator(self.config.run.seed, Stream.SHUFFLE, epoch))
        batches = torch.split(order.to(self.images.device), self.config.optimiser.batch_size)
        self.vae.train()
        for step_in_epoch in range(self.progress.step_in_epoch, self.steps_per_epoch):
            if interrupted.is_set():
                return False
            self._step(batches[step_in_epoch], step_in_epoch)
            self.progress = Progress(epoch, step_in_epoch + 1, self.progress.step + 1)
            if self.device.type == "cpu" or self.progress.step % _CHECK_STEPS_ON_GPU == 0:
                self._require_finite(*self.totals.tolist())
            bar.advance()
        return True

    def _step(self, batch: Tensor, step_in_epoch: int) -> None:
        """Take one step on the images with these indices, (N,)."""
        config, step = self.config, self.progress.step
        objective, likelihood = config.objective, config.objective.likelihood
        source = generator(config.run.seed, Stream.TRAINING, self.progress.epoch, step_in_epoch, device=self.device)
        pixels = self.images[batch].to(self.device)  # (N, C, H, W)
        uniform = None if likelihood == "mse" else torch.rand(pixels.shape, generator=source, device=self.device)
        noise_shape = (objective.samples, len(batch), self.vae.latent_size)
        noise = torch.randn(noise_shape, generator=source, device=self.device)
        with FastConvolutions(), autocast(config.run, self.device):
            losses, terms = objectives.losses(
                self.vae,
                objectives.observe(pixels, uniform, likelihood),
                noise,
                likelihood,
                bound=objective.bound,
                rate_weight=rate_weight(objective, step),
            )
        self.optimiser.zero_grad()
        torch.autograd.backward(losses.mean())
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), config.optimiser.max_grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config.optimiser, step, self.total_steps)
        self.optimiser.step()
        if self.ema is not None:
            update_average(config.optimiser, self.ema, self.vae, step)
        sums = torch.stack([losses.detach().sum(), terms.distortion.detach().sum(), terms.rate.detach().sum(), norm])
        self.totals += sums.double()

    def finish_epoch(self, seconds: float) -> metrics.Record:
        """Evaluate, record and publish the epoch that has just ended; return its record."""
        self._require_finite_state()
        if self.config.objective.likelihood == "gaussian" and self.config.objective.sigma == "optimal":
            self._set_sigma(optimal_sigma(self.averaged, self.data.train[:SIGMA_IMAGES]))
        self.progress = Progress(self.progress.epoch + 1, 0, self.progress.step)
        record = self._record(seconds)
        self._require_finite(*record.values())
        # The record first: see metrics.py.
        metrics.append(self.run_dir / metrics.FILE, record)
        self._add_to_board(record)
        self.totals.zero_()
        self.save()
        return record

    def _add_to_board(self, record: metrics.Record) -> None:
        if self.board is None:
            return
        epoch, epochs = self.progress.epoch, self.config.optimiser.epochs
        if epoch % math.ceil(epochs / PICTURES) == 0 or epoch == epochs:
            pixels = self.data.test if len(self.data.test) else self.data.train
            likelihood, seed = self.config.objective.likelihood, self.config.run.seed
            self.board.draw(self.averaged, pixels, likelihood, seed, self.progress.step)
        self.board.add(record)

    def save(self) -> None:
        """Publish a checkpoint of this moment, unless there is one."""
        if checkpoint.latest_position(self.run_dir) == (self.progress.epoch, self.progress.step_in_epoch):
            return
        self._require_finite_state()
        checkpoint.save(
            self.run_dir,
            config=self.config,
            dataset=self.dataset,
            progress=replace(self.progress, totals=tuple(self.totals.tolist())),
            vae=self.vae,
            ema=self.ema,
            optimiser=self.optimiser,
            environment=self.environment,
        )

    def _record(self, seconds: float) -> metrics.Record:
        """Return the epoch's figures: means over its images, in training and, under `test_`, on held-out ones."""
        images, step = len(self.images), self.progress.step
        loss, distortion, rate, norm = self.totals.tolist()
        last_rate = learning_rate(self.config.optimiser, step - 1, self.total_steps)
        record: metrics.Record = {"epoch": self.progress.epoch, "step": step, "loss": loss / images}
        record |= self._named_terms("", distortion / images, rate / images)
        record |= {"grad_norm": norm / self.steps_per_epoch, "learning_rate": last_rate}
        if self.averaged.sigma is not None:
            record["sigma"] = self.averaged.sigma
        held_out = self.data.test[: self.config.run.monitor_images]
        if len(held_out):
            terms = bound(self.averaged, held_out, self.config.objective.likelihood)
            record |= self._named_terms("test_", float(terms.distortion.mean()), float(terms.rate.mean()))
        return record | {"seconds": seconds}

    def _named_terms(self, prefix: str, distortion: float, rate: float) -> metrics.Record:
        if self.config.objective.likelihood == "mse":
            return {f"{prefix}mean_squared_error": distortion, f"{prefix}rate_nats": rate}
        return {
            f"{prefix}neg_elbo_nats": distortion + rate,
            f"{prefix}distortion_nats": distortion,
            f"{prefix}rate_nats": rate,
        }

    def _set_sigma(self, sigma: float) -> None:
        for module in (self.vae, self.averaged):
            if module.log_sigma is not None:
                module.log_sigma.fill_(math.log(sigma))

    def _require_finite_state(self) -> None:
        weights = torch.stack([tensor.detach().sum() for tensor in self.vae.parameters()])
        self._require_finite(*self.totals.tolist(), *weights.tolist())

    def _require_finite(self, *figures: float) -> None:
        """Raise DivergedError unless all figures are finite; a sum is not if one of its terms is not."""
        if all(math.isfinite(figure) for figure in figures):
            return
        epoch = math.ceil(self.progress.step / self.steps_per_epoch)
        newest = checkpoint.latest(self.run_dir)
        kept = "no checkpoint was made yet" if newest is None else f"the last good checkpoint is {newest}"
        raise DivergedError(
            f"the loss or its gradient became infinite or not a number in epoch {epoch}, by step {self.progress.step}; "
            f"{kept}. Lower optimiser.learning_rate ({self.config.optimiser.learning_rate:g}) or "
            "optimiser.max_grad_norm, or raise optimiser.warmup_steps, and train in another run folder"
        )
