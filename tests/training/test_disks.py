"""A disk that is full or read-only: one line that says what is kept, nothing half-written, and work that goes on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import disks
from runs import tiny_config
from vaeserve_training.fit import fit

pytestmark = [
    pytest.mark.skipif(bool(disks.why_not()), reason=disks.why_not() or "disks can be mounted here"),
    pytest.mark.timeout(300),
]

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the two disks are, the read-only one with a finished run, and a folder with room."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("full", "read-only", "ample")}
    disk = made["read-only"]
    images = np.random.default_rng(0).integers(0, 256, (130, 4, 4), dtype=np.uint8)
    np.savez(disk / "images.npz", train_images=images[:100], test_images=images[100:])
    config = tiny_config(data={"dataset": "arrays", "path": disk / "images.npz"})
    (disk / "tiny.json").write_text(config.to_json())
    fit(config, disk / "run")
    return made


@pytest.fixture(scope="module")
def files_before(folders: dict[str, Path]) -> list[str]:
    """What lies on the read-only disk."""
    disk = folders["read-only"]
    return sorted(path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def outcomes(folders: dict[str, Path], files_before: list[str]) -> dict[str, Outcomes]:
    """What came of every writer on either disk: of one process, most of whose time goes into its imports."""
    assert files_before
    command = disks.command(*(folders[name] for name in ("full", "read-only", "ample")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Outcomes] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def full(folders: dict[str, Path], outcomes: dict[str, Outcomes]) -> tuple[Path, Outcomes]:
    return folders["full"], outcomes["full"]


def test_a_run_on_a_full_disk_says_what_it_kept_and_goes_on_from_there(full: tuple[Path, Outcomes]) -> None:
    disk, outcomes = full
    stopped = outcomes["fit"]
    assert stopped["status"] == 1
    assert stopped["err"].startswith(f"vaeserve-train fit: {disk}/run/")
    assert " cannot be written: No space left on device; kept: " in stopped["err"]
    assert stopped["err"].endswith(", whole; resume the run from there\n")
    assert stopped["err"].count("\n") == 1
    assert not [name for name in stopped["left"] if ".tmp" in name]
    again = outcomes["fit, with room again"]
    assert (again["status"], again["err"]) == (0, "")
    assert "trained: " in again["out"]


REFUSALS = {
    "fit, from the start": "new/",
    "fit-prior": "run/prior.safetensors",
    "export": "models/tiny/1 cannot be written: No space left on device; nothing was published",
    "evaluate": "figures.json cannot be written: No space left on device; it was printed instead",
    "figures": "picture.png",
    "ladder": "cache/",
    "data cache": "cache/file.gz cannot be written",
    "vaeserve .npy": "images.npy: cannot be written",
    "vaeserve .npz": "images.npz: cannot be written (No space left on device); nothing half-written was left",
    "vaeserve .png": "picture.png: cannot be written (No space left on device); nothing half-written was left",
    "vaeserve folder": "images: cannot be written (No space left on device); nothing half-written was left",
}


@pytest.mark.parametrize("writer", REFUSALS)
def test_every_writer_names_the_file_and_leaves_nothing_of_it(full: tuple[Path, Outcomes], writer: str) -> None:
    disk, outcomes = full
    found = outcomes[writer]
    assert found["status"] in {1, None}
    assert f"{disk}/{REFUSALS[writer]}" in found["err"]
    assert found["err"].strip().count("\n") == 0
    assert not [name for name in found["left"] if ".tmp" in name or name.split("/")[0] not in {"run", "new"}]


def test_figures_that_cannot_be_written_are_not_lost(full: tuple[Path, Outcomes]) -> None:
    assert json.loads(full[1]["evaluate"]["out"])["evaluations"]


def test_a_read_only_place_is_told_before_the_work(
    folders: dict[str, Path], files_before: list[str], outcomes: dict[str, Outcomes]
) -> None:
    assert outcomes["read-only"]["export from it"]["status"] == 0
    assert (folders["ample"] / "models" / "tiny" / "1" / "model.json").is_file()
    for name, found in outcomes["read-only"].items():
        assert found["left"] == files_before, name
        if name != "export from it":
            assert (found["status"], found["err"].count("\n")) == (1, 1), (name, found)
            assert "Read-only file system" in found["err"]
