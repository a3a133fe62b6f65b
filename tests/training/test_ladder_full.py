"""What `--full` and the default would train, and that a ladder in the shape of --full goes on after SIGKILL.

The suite kills one step, in training and in measuring; VAESERVE_CRASHES=20, as `make crash` sets it, kills all eleven.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import climbs
from vaeserve_training.compute import cpu_threads
from vaeserve_training.config import preset
from vaeserve_training.ladder import climb
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.registry import STEPS
from vaeserve_training.ladder.scale import FULL, QUICK, Scale
from vaeserve_training.ladder.systems import Spec
from vaeserve_training.ladder.training import total_steps
from vaeserve_training.ladder.workshop import networks

THOROUGH = int(os.environ.get("VAESERVE_CRASHES", "1")) > 1
# The networks of steps 6, 8 and 9 are there by then: those of steps 4, 5 and 7.
WITH_NETWORKS_OF_ITS_OWN = (1, 2, 3, 4, 5, 7, 10, 11)
KILLS = [
    (number, kill_at, 2 if number in (3, 5) else 1)
    for number in STEPS
    for kill_at in ("trained:8", "measured:2000")
    if kill_at.startswith("measured") or number in WITH_NETWORKS_OF_ITS_OWN
]
SHORT = [(2, "trained:8", 1), (2, "measured:2000", 1)]  # starting processes takes long


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    """The results in a folder by the step's number, without the seconds they took."""
    found = json.loads((folder / climb.RESULTS).read_bytes())["steps"]
    return {step["number"]: {key: value for key, value in step.items() if key != "seconds"} for step in found}


def climb_tiny(folder: Path, number: int) -> dict[str, Any]:
    with cpu_threads(1):
        climb.climb(climbs.TINY, climbs.noise_with_labels(), folder, numbers=(number,), device="cpu", workers=1)
    return steps_of(folder)[number]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ladder that is never killed, and one that is killed again and again: their cached networks serve all steps."""
    return tmp_path_factory.mktemp("reference"), tmp_path_factory.mktemp("killed")


@pytest.mark.parametrize(("number", "kill_at", "workers"), KILLS if THOROUGH else SHORT)
def test_a_step_that_was_killed_goes_on_to_the_same_results(
    folders: tuple[Path, Path], number: int, kill_at: str, workers: int
) -> None:
    reference, killed = folders
    (killed / "steps" / f"{number:02}.json").unlink(missing_ok=True)  # an earlier kill's
    before = set((killed / "cache").glob("[!.]*"))
    command = [sys.executable, climbs.__file__, str(killed), str(number), kill_at, str(workers)]
    # Its workers hold the other end of the pipes, so this waits until they, too, have ended.
    ended = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    kept = set((killed / "cache").glob("[!.]*")) - before
    assert kept or kill_at.startswith("measured")
    times = {path: path.stat().st_mtime_ns for entry in kept for path in entry.iterdir()}
    found = climb_tiny(killed, number)
    assert found == climb_tiny(reference, number)
    assert {path: path.stat().st_mtime_ns for path in times} == times  # what was finished was not trained again
    for picture in found["pictures"]:
        assert (killed / picture["file"]).read_bytes() == (reference / picture["file"]).read_bytes()


def planned(scale: Scale, folder: Path) -> dict[int, list[Spec]]:
    """The networks that each step needs of a data set as large as MNIST."""
    tiny = climbs.noise_with_labels()
    train, test = (np.broadcast_to(np.uint8(0), (count, 1, 28, 28)) for count in (60_000, 10_000))
    data = dataclasses.replace(tiny, train=train, test=test)
    lab = Lab(scale.within(data), data, folder)
    assert lab.scale.samples == scale.samples
    return {
        number: [task for task in networks(lab, [step]).values() if isinstance(task, Spec)]
        for number, step in STEPS.items()
    }


@pytest.mark.parametrize(
    ("scale", "growing", "base", "seeds"),
    [
        (QUICK, {1_000, 3_000, 10_000}, "mnist-mlp", {0}),
        (FULL, {1_000, 5_000, 60_000}, "mnist", {0, 1, 2}),
    ],
    ids=["quick", "full"],
)
def test_the_plan_is_what_was_promised(
    tmp_path: Path, scale: Scale, growing: set[int], base: str, seeds: set[int]
) -> None:
    steps = planned(scale, tmp_path)
    for number, specs in steps.items():
        assert {spec.config.run.seed for spec in specs} == seeds
        if number <= 3:
            assert all(spec.config.model.channels for spec in specs)  # what memorises is deconvolutional
            continue
        assert {spec.images for spec in specs} == (growing if number == 10 else {max(growing)})
        full_size = [spec for spec in specs if spec.config.model.latent_size > 2]
        assert {spec.config.model for spec in full_size} == {preset(base).model}
        assert all(total_steps(spec) == pytest.approx(scale.steps, rel=0.02) for spec in specs)
    assert {spec.config.objective.beta for spec in steps[7]} == {0.1, 0.3, 1, 2, 4, 8}
    assert {spec.images for spec in steps[2]} == {1, 4, 16, 64}
    assert {spec.config.model.latent_size for spec in steps[3]} == {1, 2, 4, 8, 16}
    assert {spec.config.model.latent_size for spec in steps[11]} == {2, preset(base).model.latent_size}
