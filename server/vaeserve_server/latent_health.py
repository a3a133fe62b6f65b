"""Is what is being encoded like what the model was trained on? Per-latent sums, and never an image or a code.

A model answers any image, and no error tells that the images have changed: another camera, inverted colours, a
forgotten division by 255. The aggregate posterior does. Its mean, variance and KL per latent are kept here as running
figures of recent rows, to be held against the same figures in the model card. They move in steps of many rows at once,
so that neither a figure nor the difference of two is the code of an image.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaeserve.v1 import vae_pb2
from vaeserve_server.checks import Floats

Doubles = NDArray[np.float64]

MAX_LATENTS = 128
"""Latents watched at most, so that neither a run's cost nor the figures grow with the model."""
WINDOW_ROWS = 4096
"""Rows after which an old row weighs 1 / e of a new one."""
STEP_ROWS = 32
"""Rows, at least, by which the running figures move on."""
_MAX_ROWS_PER_RUN = 128
_TINY = float(np.finfo(np.float32).tiny)


class Figures(NamedTuple):
    """Per watched latent, float64 `(L,)`: the posterior mean's mean, the aggregate posterior's variance, KL in nats."""

    mean: Doubles
    variance: Doubles
    kl_nats: Doubles


class LatentHealth:
    """The running figures of one encoder. `watched` are the flat, row-major indices of the latents they are of.

    `training` has the card's figures, None where it has none. `rows` counts every row seen since the start.
    """

    def __init__(self, card: vae_pb2.ModelCard) -> None:
        size = math.prod(card.latent_shape)
        # Spread evenly, so that every channel of a spatial latent has its share.
        self.watched = range(0, size, max(1, -(-size // MAX_LATENTS)))
        self.training = _training(card.latent_statistics, size, self.watched)
        self.rows = 0
        self._lock = threading.Lock()
        self._weight = 0.0
        self._sums = np.zeros((4, len(self.watched)))  # of mean, stddev^2, mean^2 and log stddev
        self._new_rows = 0
        self._new_sums = np.zeros_like(self._sums)

    def watch(self, run: Callable[[Floats], Sequence[Floats]]) -> Callable[[Floats], Sequence[Floats]]:
        """Return the encoder `run` that also adds what it gives to the figures, in the thread that it runs in."""

        def watched_run(batch: Floats) -> Sequence[Floats]:
            outputs = run(batch)
            self.add(outputs[0], outputs[1])
            return outputs

        return watched_run

    def add(self, mean: Floats, stddev: Floats) -> None:
        """Take in the posteriors of a run, each float32 `(N, *latent_shape)`: all rows, or 65 to 128 of a larger run's.

        A run that is not finite is left out.
        """
        step = -(-len(mean) // _MAX_ROWS_PER_RUN)
        mean, stddev = mean[::step], stddev[::step]
        rows = len(mean)
        terms = np.empty((4, rows, len(self.watched)))
        terms[0] = mean.reshape(rows, -1)[:, :: self.watched.step]
        terms[1] = stddev.reshape(rows, -1)[:, :: self.watched.step]
        with np.errstate(all="ignore"):
            terms[3] = np.log(terms[1], dtype=np.float32)
            np.multiply(terms[0], terms[0], out=terms[2])
            np.multiply(terms[1], terms[1], out=terms[1])
            sums = np.add.reduce(terms, axis=1)
            if not math.isfinite(np.add.reduce(sums, axis=None)):
                return
        with self._lock:
            self.rows += rows
            self._new_rows += rows
            self._new_sums += sums
            if self._new_rows >= STEP_ROWS:
                self._move_on()

    def running(self) -> Figures | None:
        """Return the figures of recent rows; None before the first `STEP_ROWS`."""
        with self._lock:
            if not self._weight:
                return None
            mean, variance, mean_square, log_stddev = self._sums / self._weight
        # Var[z] = Var[mean] + E[stddev^2]; KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1) / 2 - log s, here in expectation.
        kl_nats = (mean_square + variance - 1) / 2 - log_stddev
        return Figures(mean, np.maximum(mean_square - mean * mean, 0) + variance, kl_nats)

    def _move_on(self) -> None:
        decay = math.exp(-self._new_rows / WINDOW_ROWS)
        self._sums *= decay
        self._sums += self._new_sums
        self._weight = self._weight * decay + self._new_rows
        self._new_rows = 0
        self._new_sums[:] = 0


def drift_nats(now: Figures, training: Figures) -> Doubles:
    """Return KL(N(now) || N(training)) of each latent, in nats, float64 `(L,)`."""
    variance, training_variance = np.maximum(now.variance, _TINY), np.maximum(training.variance, _TINY)
    ratio = variance / training_variance
    return (ratio - 1 - np.log(ratio) + (now.mean - training.mean) ** 2 / training_variance) / 2


def _training(statistics: vae_pb2.LatentStatistics, size: int, watched: range) -> Figures | None:
    fields = statistics.mean, statistics.stddev, statistics.kl_nats
    if any(len(field) != size for field in fields):
        return None
    mean, stddev, kl_nats = (np.array(field, np.float64)[:: watched.step] for field in fields)
    return Figures(mean, stddev * stddev, kl_nats)
