"""Train the ladder's networks side by side, each in a process and on a core of its own.

They are too small to be shared between cores: threads that wait for each other at every layer lose more than they gain,
and on a busy machine nearly everything. So several networks are trained at a time, ahead of the steps that need them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from vaeserve_training.compute import choose_device
from vaeserve_training.data import ImageData
from vaeserve_training.ladder import lenet
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.systems import Spec
from vaeserve_training.ladder.training import Advance, total_steps

if TYPE_CHECKING:  # the steps draw, and a process that only trains need not wait for Matplotlib
    from vaeserve_training.ladder.registry import Step

MOST_WORKERS = 8  # each needs some 600 MB
_NICE = 5  # measuring comes first: all that is left to do waits for it, and training is ahead of it

_CLASSIFIER = "classifier"
_in_worker: list[Lab] = []  # the worker process's own, set by `_start_worker`


class WorkerError(RuntimeError):
    """A process that trained a network is gone; the message says what to do."""


def default_workers(device: str) -> int:
    """Return how many networks to train at a time: as many as PyTorch would use threads; one on a GPU."""
    return 1 if choose_device(device).type == "cuda" else min(torch.get_num_threads(), MOST_WORKERS)


class Workshop:
    """Trains what steps need and the cache does not have; with one worker in this process, when it is asked for."""

    def __init__(self, lab: Lab, steps: Sequence[Step], workers: int, advance: Advance) -> None:
        self._lab = lab
        self._advance = advance
        self._futures: dict[str, Future[None]] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._processes: list[BaseProcess] = []
        tasks = networks(lab, steps)
        if workers > 1 and len(tasks) > 1:
            others = multiprocessing.active_children()
            self._pool = ProcessPoolExecutor(
                min(workers, len(tasks)),
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(lab.scale, lab.data, lab.out, lab.device),
            )
            with _interrupts_for_the_parent_alone():
                for key, task in tasks.items():
                    self._futures[key] = self._pool.submit(_train, task)
                    self._futures[key].add_done_callback(self._count(task))
            self._processes = [process for process in multiprocessing.active_children() if process not in others]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if error is not None:  # a network that nobody waits for any more is not trained to its end
            for future in self._futures.values():
                future.cancel()
            for process in self._processes:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)  # waits for the processes; two threads that join one take turns badly

    @property
    def busy(self) -> bool:
        """Whether other processes train, and so use the cores."""
        return any(not future.done() for future in self._futures.values())

    def wait_for(self, step: Step) -> None:
        """Return when all that the step needs is trained. Raises what its training raised, and WorkerError."""
        for key, task in networks(self._lab, [step]).items():
            if self._pool is not None:
                self._finish(self._futures[key])
            elif isinstance(task, Spec):
                self._lab.trained(task)
            else:
                _ = self._lab.classifier

    @staticmethod
    def _finish(future: Future[None]) -> None:
        try:
            future.result()
        except BrokenProcessPool as error:
            raise WorkerError(
                "a process that trained a network was killed, most likely for want of memory (each takes some 600 MB); "
                "finished networks are kept: run it again, with OMP_NUM_THREADS=1 for one process"
            ) from error

    def _count(self, task: Spec | str) -> Callable[[Future[None]], None]:
        steps = training_steps(self._lab, task)
        return lambda future: None if future.cancelled() else self._advance(steps)


def networks(lab: Lab, steps: Sequence[Step]) -> dict[str, Spec | str]:
    """Return what the cache does not have of all that the steps need, each once, in the ladder's order."""
    missing: dict[str, Spec | str] = {}
    for step in steps:
        missing |= {spec.model_dump_json(): spec for spec in lab.missing(step.systems(lab.scale))}
        if step.classifier and not lab.cache.has(lab.classifier_key):
            missing[_CLASSIFIER] = _CLASSIFIER
    return missing


def training_steps(lab: Lab, task: Spec | str) -> int:
    """Return the optimiser steps that training takes at most."""
    if isinstance(task, Spec):
        return total_steps(task)
    return lenet.total_steps(lab.scale.train_images, lab.scale.classifier_epochs)


@contextmanager
def _interrupts_for_the_parent_alone() -> Iterator[None]:
    """Ctrl-C reaches all processes. Those started here inherit that it is held back; the parent gets it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would let it through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(scale: Scale, data: ImageData, out: Path, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(_NICE)
    _in_worker.append(Lab(scale, data, out, device))


def _end_with_the_parent() -> None:
    """Leave with a parent that was killed: nobody else would tell this process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(task: Spec | str) -> None:
    """Train a network in a worker process; it is handed over by way of the cache."""
    (lab,) = _in_worker
    if isinstance(task, Spec):
        lab.trained(task)
    else:
        _ = lab.classifier
