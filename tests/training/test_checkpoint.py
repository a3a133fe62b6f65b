from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from runs import tiny_config, tiny_data
from vaeserve_training import checkpoint
from vaeserve_training.checkpoint import CheckpointError
from vaeserve_training.config import ConfigError
from vaeserve_training.fit import fit
from vaeserve_training.trainer import FitError


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished")
    fit(tiny_config(), run_dir, data=tiny_data())
    return run_dir


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_checkpoint_says_what_it_is(run_dir: Path) -> None:
    loaded = checkpoint.load(run_dir)
    data = tiny_data()
    assert loaded.path == run_dir / "checkpoints" / "epoch-0004"
    assert loaded.config == tiny_config()
    assert loaded.dataset == checkpoint.DatasetInfo("tiny", data.sha256, 100, 30, binarised=False)
    assert loaded.progress.epoch == 4
    assert loaded.progress.step == 28
    assert loaded.environment["torch"] == torch.__version__
    assert loaded.environment["threads"] == "1"


def test_the_model_comes_ready_to_use_with_the_averaged_weights(run_dir: Path) -> None:
    loaded = checkpoint.load(run_dir)
    assert not loaded.vae.training
    averaged = checkpoint.read_weights(loaded.path / checkpoint.EMA)
    current = checkpoint.read_weights(loaded.path / checkpoint.WEIGHTS)
    for name, parameter in loaded.vae.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, averaged[name])
        assert not torch.equal(parameter, current[name])


def test_the_weights_digest_is_that_of_the_weights(run_dir: Path) -> None:
    newest = checkpoint.load(run_dir)
    older = checkpoint.load(run_dir / "checkpoints" / "epoch-0003")
    assert newest.weights_sha256 == checkpoint.load(newest.path).weights_sha256
    assert newest.weights_sha256 != older.weights_sha256


def test_only_the_newest_checkpoints_stay(run_dir: Path, tmp_path: Path) -> None:
    assert [path.name for path in checkpoint.all_of(run_dir)] == ["epoch-0003", "epoch-0004"]
    fit(tiny_config(run={"keep_checkpoints": 3}), tmp_path / "three", data=tiny_data())
    assert [path.name for path in checkpoint.all_of(tmp_path / "three")] == ["epoch-0002", "epoch-0003", "epoch-0004"]


def test_checkpoints_are_ordered_by_epoch_and_step_not_by_letter(tmp_path: Path) -> None:
    names = ["epoch-0002", "epoch-0002-step-000010", "epoch-9999", "epoch-10000", "epoch-10000-step-000001"]
    for name in [*reversed(names), ".epoch-20000.abc.tmp", "notes"]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint.all_of(tmp_path)] == names
    assert checkpoint.latest_position(tmp_path) == (10000, 1)


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.PROGRESS, checkpoint.EMA])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_is_named(run_dir: Path, name: str, damage: str) -> None:
    file = run_dir / "checkpoints" / "epoch-0004" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises((CheckpointError, ConfigError), match=name):
        checkpoint.read_header(file.parent)
        checkpoint.load(file.parent)


def test_damaged_optimiser_state_is_named_when_resuming(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "epoch-0004")
    file = run_dir / "checkpoints" / "epoch-0003" / checkpoint.OPTIMISER
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=checkpoint.OPTIMISER):
        fit(tiny_config(), run_dir, resume=True, data=tiny_data())


def test_optimiser_state_with_a_pickled_object_is_refused(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints" / "epoch-0004")
    torch.save({"state": Path("x"), "param_groups": []}, run_dir / "checkpoints" / "epoch-0003" / checkpoint.OPTIMISER)
    with pytest.raises(CheckpointError, match=checkpoint.OPTIMISER):
        fit(tiny_config(), run_dir, resume=True, data=tiny_data())


def test_weights_of_another_model_are_refused(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "epoch-0004" / checkpoint.CONFIG
    config = json.loads(path.read_text())
    config["model"]["latent_size"] = 5
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"ema\.safetensors.*another model"):
        checkpoint.load(run_dir)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_folder_without_a_checkpoint_says_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="vaeserve-train fit"):
        checkpoint.load(tmp_path / name)


def test_no_space_left_leaves_the_older_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def fail_in_the_second_checkpoint(descriptor: int, fsync: object = os.fsync) -> None:
        nonlocal written
        written += 1
        if written > 13:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)  # type: ignore[operator]

    monkeypatch.setattr(os, "fsync", fail_in_the_second_checkpoint)
    with pytest.raises(FitError) as caught:
        fit(tiny_config(), tmp_path, data=tiny_data())
    assert str(caught.value).startswith(f"{tmp_path}/checkpoints/epoch-0002/")
    kept = tmp_path / "checkpoints" / "epoch-0001"
    assert str(caught.value).endswith(
        f" cannot be written: No space left on device; kept: {kept}, whole; resume the run from there"
    )
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["epoch-0001"]
    checkpoint.load(tmp_path)
