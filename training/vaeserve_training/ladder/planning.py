"""What a run of the ladder will train, and about how long it will take, said before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.registry import STEPS, Step
from vaeserve_training.ladder.systems import Spec, build
from vaeserve_training.ladder.workshop import networks, training_steps

# A slow core of a server of the 2020s: a step of training costs this much, plus three forward passes at this speed.
_OVERHEAD_S = 2e-3
_FLOPS_PER_S = 4e10
_CLASSIFIER_STEP_S = 2e-2


def plan(lab: Lab, numbers: Sequence[int], todo: Sequence[Step], workers: int) -> Table:
    """Return, for a terminal, what each step trains and takes; a network counts where it is needed first."""
    table = Table(title=f"The ladder, {lab.scale.name}, in seconds of one core at most")
    table.add_column("step", justify="right")
    table.add_column("")
    table.add_column("networks", justify="right")
    table.add_column("time", justify="right")
    counted: set[str] = set()
    total_s = 0.0
    for number in sorted(set(numbers)):
        step = STEPS[number]
        if step not in todo:
            table.add_row(str(number), step.title, "", "finished")
            continue
        tasks = {key: task for key, task in networks(lab, [step]).items() if key not in counted}
        counted |= tasks.keys()
        seconds = sum(training_s(lab, task) for task in tasks.values()) + step.measure_s * len(lab.scale.seeds)
        total_s += seconds
        table.add_row(str(number), step.title, str(len(tasks)), f"{seconds:.0f} s")
    table.add_section()
    table.add_row("", f"together, on {workers} at a time", str(len(counted)), f"{total_s / workers / 60:.1f} min")
    return table


def training_s(lab: Lab, task: Spec | str) -> float:
    """Return the seconds that training takes one core at most, by the operations that it takes."""
    steps = training_steps(lab, task)
    if not isinstance(task, Spec):
        return steps * _CLASSIFIER_STEP_S
    system = build(task, lab.data)
    image = torch.zeros(1, *task.config.data.image_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        code = system.code(image, torch.zeros(1, dtype=torch.int64), torch.zeros(1, system.latent_size))
        system.logits(code.latent)
    per_image_s = 3 * int(counter.get_total_flops()) / _FLOPS_PER_S
    images = min(task.config.optimiser.batch_size, task.images)
    return steps * (_OVERHEAD_S + images * per_image_s)
