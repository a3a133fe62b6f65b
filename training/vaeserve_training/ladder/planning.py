"""What a run of the ladder will train, and about how long it will take, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from vaeserve_training.ladder import lenet
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.registry import STEPS, Step
from vaeserve_training.ladder.systems import Spec, build
from vaeserve_training.ladder.training import total_steps

# Two quiet CPU cores of 2020s servers: a step of training costs this much, plus three forward passes at this speed.
_OVERHEAD_S = 1.2e-3
_FLOPS_PER_S = 1e11
_CLASSIFIER_STEP_S = 1.2e-2


def plan(lab: Lab, numbers: Sequence[int], todo: Sequence[Step]) -> Table:
    """Return, for a terminal, what each step trains and takes; a network counts where it is needed first."""
    table = Table(title=f"The ladder, {lab.scale.name}: at most so long on two quiet CPU cores")
    table.add_column("step", justify="right")
    table.add_column("")
    table.add_column("networks to train", justify="right")
    table.add_column("time", justify="right")
    counted: set[str] = set()
    total_s = 0.0
    for number in sorted(set(numbers)):
        step = STEPS[number]
        if step not in todo:
            table.add_row(str(number), step.title, "", "finished")
            continue
        networks, seconds = _cost(lab, step, counted)
        total_s += seconds
        table.add_row(str(number), step.title, str(networks), _duration(seconds))
    table.add_section()
    table.add_row("", "together", "", _duration(total_s))
    return table


def training_steps(lab: Lab, todo: Sequence[Step]) -> int:
    """Return the optimiser steps of all networks that are still to be trained."""
    specs = lab.missing(spec for step in todo for spec in step.systems(lab.scale))
    return sum(total_steps(spec) for spec in specs) + _classifier_steps(lab, todo)


def training_s(lab: Lab, spec: Spec) -> float:
    """Return the seconds that training the spec's system takes at most, by the operations that it takes."""
    system = build(spec, lab.data)
    image = torch.zeros(1, *spec.config.data.image_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        code = system.code(image, torch.zeros(1, dtype=torch.int64), torch.zeros(1, system.latent_size))
        system.logits(code.latent)
    per_image_s = 3 * int(counter.get_total_flops()) / _FLOPS_PER_S
    images = min(spec.config.optimiser.batch_size, spec.images)
    return total_steps(spec) * (_OVERHEAD_S + images * per_image_s)


def _cost(lab: Lab, step: Step, counted: set[str]) -> tuple[int, float]:
    """Return how many networks the step trains, and its seconds; networks in `counted` are left out, others put in."""
    missing = [spec for spec in lab.missing(step.systems(lab.scale)) if spec.model_dump_json() not in counted]
    counted |= {spec.model_dump_json() for spec in missing}
    networks, seconds = len(missing), sum(training_s(lab, spec) for spec in missing)
    classifier_steps = _classifier_steps(lab, [step])
    if classifier_steps and "classifier" not in counted:
        counted.add("classifier")
        networks += 1
        seconds += classifier_steps * _CLASSIFIER_STEP_S
    return networks, seconds + step.measure_s * len(lab.scale.seeds)


def _classifier_steps(lab: Lab, todo: Sequence[Step]) -> int:
    if not any(step.classifier for step in todo) or lab.cache.has(lab.classifier_key):
        return 0
    return lenet.total_steps(lab.scale.train_images, lab.scale.classifier_epochs)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
