"""The training loop: plain PyTorch, resumable at any moment with bit-identical weights.

    vaeserve-train fit --preset mnist --run-dir runs/mnist

Exactness rests on three things: every random number is a function of (seed, epoch, step), the learning rate is a
function of the step, and a checkpoint holds everything else. It holds on one CPU machine with the same versions and
thread count; where those have changed, resuming warns.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vaeserve_training import atomic, checkpoint, metrics
from vaeserve_training.board import Board, require
from vaeserve_training.compute import cpu_threads
from vaeserve_training.config import TrainConfig, differences
from vaeserve_training.data import ImageData, load
from vaeserve_training.progress import Bar
from vaeserve_training.trainer import FitError, Trainer

logger = logging.getLogger(__name__)


class InterruptedTrainingError(KeyboardInterrupt):
    """Training was stopped by Ctrl-C. `checkpoint` is the newest whole checkpoint, None if there is none yet."""

    def __init__(self, newest: Path | None) -> None:
        super().__init__("training was interrupted")
        self.checkpoint = newest


def fit(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    show_progress: bool = False,
    tensorboard: bool = False,
    data: ImageData | None = None,
) -> Path:
    """Train to the end and return the last checkpoint's folder; with `resume`, go on from the newest one.

    `tensorboard` writes event files as well, into the run's folder `tensorboard`. `data` spares loading what
    `config.data` describes. Resuming a finished run returns at once. Raises FitError if the folder holds a run already
    (without `resume`) or another run's (with it), DivergedError, DataError, ConfigError, CheckpointError, BoardError,
    InterruptedTrainingError.
    """
    if tensorboard:
        require()
    newest = checkpoint.latest(run_dir)
    header = None if newest is None else checkpoint.read_header(newest)
    if header is not None:
        if not resume:
            raise FitError(
                f"{run_dir} holds a run already ({header.path.name}); resume it or choose another run folder"
            )
        _check_same_config(header, config)
        if header.progress.epoch == config.optimiser.epochs:
            with _board(run_dir, wanted=tensorboard):  # gets what it lacks
                return header.path
    with _saying_what_is_kept(run_dir):
        atomic.require_writable(run_dir / checkpoint.CONFIG)
    with cpu_threads(config.run.threads):
        trainer = Trainer(config, run_dir, data or load(config.data))
        with _saying_what_is_kept(run_dir):
            trainer.start(header)
            with _board(run_dir, wanted=tensorboard) as trainer.board:
                _run(trainer, show_progress=show_progress)
    return checkpoint.resolve(run_dir)


@contextmanager
def _saying_what_is_kept(run_dir: Path) -> Iterator[None]:
    """Let the disk's refusal say what is left of the run, and how to go on."""
    try:
        yield
    except OSError as error:
        newest = checkpoint.latest(run_dir)
        kept = "no checkpoint was made yet" if newest is None else f"kept: {newest}, whole; resume the run from there"
        raise FitError(f"{error.filename or run_dir} cannot be written: {error.strerror or error}; {kept}") from error


def _run(trainer: Trainer, *, show_progress: bool) -> None:
    epochs = trainer.config.optimiser.epochs
    with (
        _deferred_interrupt() as interrupted,
        Bar("training", trainer.total_steps, done=trainer.progress.step, show=show_progress) as bar,
    ):
        while trainer.progress.epoch < epochs:
            started_s = time.perf_counter()
            if not trainer.run_epoch(bar, interrupted):
                trainer.save()
                raise InterruptedTrainingError(checkpoint.latest(trainer.run_dir))
            record = trainer.finish_epoch(time.perf_counter() - started_s)
            words = f"epoch {trainer.progress.epoch}/{epochs}: {_in_words(record)}"
            logger.info("%s", words)
            bar.note(words)


def _in_words(record: metrics.Record) -> str:
    named = {"neg_elbo_nats": "-ELBO", "test_neg_elbo_nats": "held-out -ELBO", "rate_nats": "rate"}
    shown = {words: record[key] for key, words in named.items() if key in record}
    if "neg_elbo_nats" not in record:
        shown = {"loss": record["loss"]} | shown
    return ", ".join(f"{words} {value:.2f}" for words, value in shown.items())


def _check_same_config(header: checkpoint.Header, config: TrainConfig) -> None:
    fields = differences(header.config, config)
    longer = config.optimiser.epochs > header.progress.epoch
    if fields == ["optimiser.epochs"] and longer and config.optimiser.schedule != "cosine":
        return  # the run so far is the beginning of the longer one
    if fields:
        hint = " (the learning rate's schedule is laid out over all epochs)" if "optimiser.epochs" in fields else ""
        raise FitError(
            f"{header.path} was made under another configuration, which differs in {', '.join(fields)}{hint}; "
            "resume with the same values, or choose another run folder"
        )


@contextmanager
def _board(run_dir: Path, *, wanted: bool) -> Iterator[Board | None]:
    if not wanted:
        yield None
        return
    board = Board(run_dir)
    try:
        yield board
    finally:
        board.close()


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is cut in two; the second one interrupts at once.

    Signals belong to the main thread; in another one the event is never set.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def request(_signal: int, _frame: FrameType | None) -> None:
        requested.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("finishing this step and saving; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, request)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, before)
