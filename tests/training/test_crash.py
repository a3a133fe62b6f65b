"""SIGKILL at any moment: a writer leaves the old or the new whole, and a run that goes on ends bit for bit the same.

The suite kills a run at 1 moment (test_fit.py at more); VAESERVE_CRASHES=20, as `make crash` sets it, at so many.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import crashes
from killer import Killer
from runs import tiny_config, tiny_data, warm_up
from same_run import Kill, assert_same_run
from vaeserve_server.errors import NoModelsError
from vaeserve_server.models_folder import ModelsFolder
from vaeserve_training import bundle, checkpoint
from vaeserve_training.fit import fit

MOMENTS = int(os.environ.get("VAESERVE_CRASHES", "1"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """What was left by writers that died at each of their file operations, and how many there are."""
    root = tmp_path_factory.mktemp("killed")
    command = [sys.executable, crashes.__file__, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


def test_an_exporter_killed_at_any_file_operation_publishes_all_or_nothing(killed: tuple[Path, dict[str, int]]) -> None:
    root, operations = killed
    assert operations["publish"] > 15
    published = []
    for number in range(1, operations["publish"] + 2):
        models = root / f"publish-{number:03}"
        try:
            listed = ModelsFolder(models).published()
        except NoModelsError:
            listed = {}
        assert list(map(str, listed.get("tiny", []))) in ([], ["tiny/1"])
        published.append(bool(listed))
        for folder in [models / "tiny" / "1"] if listed else []:
            assert sorted(path.name for path in folder.iterdir()) == ["decoder.onnx", "encoder.onnx", "model.json"]
            for graph in bundle.read_card(folder).graphs:
                assert hashlib.sha256((folder / graph.file).read_bytes()).hexdigest() == graph.sha256
        following = bundle.publish(models, crashes.card(), crashes.GRAPHS)
        assert following == models / "tiny" / ("2" if listed else "1")
    assert published == sorted(published)  # nothing until one moment, all from then on
    assert {False, True} == set(published)


def test_a_file_that_is_replaced_is_the_old_or_the_new_one_at_any_moment(killed: tuple[Path, dict[str, int]]) -> None:
    root, operations = killed
    found = [(root / f"write-{number:03}" / "file").read_bytes() for number in range(1, operations["write"] + 2)]
    at = found.index(crashes.NEW)
    assert at > 0
    assert found == [crashes.OLD] * at + [crashes.NEW] * (len(found) - at)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, float]:
    """A run that was never interrupted, the function calls it took, and its seconds."""
    warm_up()
    started_s = time.perf_counter()
    fit(tiny_config(), tmp_path_factory.mktemp("timed"), data=tiny_data())
    seconds = time.perf_counter() - started_s
    killer = Killer("calls:-1")
    sys.setprofile(killer)
    try:
        path = fit(tiny_config(), tmp_path_factory.mktemp("reference"), data=tiny_data())
    finally:
        sys.setprofile(None)
    return path, killer.seen, seconds


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_weights(
    tmp_path: Path, reference: tuple[Path, int, float], kill: Kill, moment: int
) -> None:
    uninterrupted, calls, seconds = reference
    part = random.Random(moment).uniform(0.02, 0.95)
    end = (tiny_config().optimiser.epochs, 0)
    run_dir = tmp_path / "0"
    if moment % 2:
        kill(run_dir, f"calls:{int(part * calls)}")
    else:  # by the clock, in whatever there is between two calls of Python's; sooner, if the run was faster
        for attempt in range(8):
            run_dir = tmp_path / str(attempt)
            kill(run_dir, f"seconds:{part * seconds / 2 ** (attempt + 1):.4f}")
            if checkpoint.latest_position(run_dir) < end:
                break
    reached = checkpoint.latest_position(run_dir)
    assert reached < end
    assert_same_run(fit(tiny_config(), run_dir, resume=True, data=tiny_data()), uninterrupted)
    print(f"went on from epoch {reached[0]} of {tiny_config().optimiser.epochs}")
