"""TensorBoard's event files, read back: every epoch once and with the figures of metrics.jsonl, however it was run."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs import tiny_config, tiny_data
from vaeserve_training import board, metrics
from vaeserve_training.__main__ import main
from vaeserve_training.config import TrainConfig
from vaeserve_training.fit import fit
from vaeserve_training.trainer import Trainer

EVERYTHING = {"scalars": 0, "images": 0}
CONSTANT = {"optimiser": {"schedule": "constant", "epochs": 4, "batch_size": 16, "warmup_steps": 5, "ema_decay": 0.9}}


def events_of(run_dir: Path) -> Any:
    events = EventAccumulator(str(run_dir / board.FOLDER), size_guidance=EVERYTHING)
    events.Reload()
    return events


def require_curves_of_metrics(run_dir: Path) -> None:
    """Every figure of metrics.jsonl is in the event files exactly once, and nothing else is."""
    records, events = metrics.read(run_dir / metrics.FILE), events_of(run_dir)
    names = set(records[0]) - {"step"}
    assert {tag.replace("test/", "test_").removeprefix("train/") for tag in events.Tags()["scalars"]} == names
    for tag in events.Tags()["scalars"]:
        name = tag.replace("test/", "test_").removeprefix("train/")
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(record["step"], np.float32(record[name])) for record in records], tag


def pictures(run_dir: Path, name: str) -> dict[int, NDArray[np.uint8]]:
    return {
        event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        for event in events_of(run_dir).Images(name)
    }


def fit_with_board(run_dir: Path, config: TrainConfig | None = None, **options: Any) -> None:
    fit(config or tiny_config(), run_dir, data=tiny_data(), tensorboard=True, **options)


def test_curves_are_those_of_the_metrics(tmp_path: Path) -> None:
    fit_with_board(tmp_path)
    assert [record["epoch"] for record in metrics.read(tmp_path / metrics.FILE)] == [1, 2, 3, 4]
    require_curves_of_metrics(tmp_path)


def test_pictures_show_the_test_images_over_their_reconstructions_and_samples(tmp_path: Path) -> None:
    fit_with_board(tmp_path, tiny_config(objective={"likelihood": "mse"}))
    reconstructions = pictures(tmp_path, board.RECONSTRUCTIONS)
    assert list(reconstructions) == [7, 14, 21, 28]  # few epochs: each of them
    upper = np.concatenate(list(tiny_data().test[:8, 0]), axis=1)
    assert np.array_equal(reconstructions[28][:4, :, 0], upper)
    assert reconstructions[28].shape == (8, 32, 3)
    assert not np.array_equal(reconstructions[7][4:], reconstructions[28][4:])  # it has learned
    samples = pictures(tmp_path, board.SAMPLES)
    assert samples[28].shape == (32, 32, 3)
    assert not np.array_equal(samples[7], samples[28])


def test_a_long_run_is_drawn_a_few_times_its_end_included(tmp_path: Path) -> None:
    epochs = 2 * board.PICTURES + 1
    fit_with_board(tmp_path, tiny_config(optimiser={"epochs": epochs}))
    steps = sorted(pictures(tmp_path, board.SAMPLES))
    assert steps[:2] == [3 * 7, 6 * 7]
    assert steps[-1] == epochs * 7
    assert len(steps) <= board.PICTURES


def test_a_run_that_was_cut_off_goes_on_with_the_same_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off at the worst moment: the event file has the epoch, the checkpoint has not; and its end is torn."""
    save = Trainer.save

    def die(trainer: Trainer) -> None:
        if trainer.progress.epoch == 3:
            raise KeyboardInterrupt
        save(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", die)
        with pytest.raises(KeyboardInterrupt):
            fit_with_board(tmp_path)
    (cut_off,) = (tmp_path / board.FOLDER).iterdir()
    assert [event.step for event in events_of(tmp_path).Scalars("train/loss")] == [7, 14, 21]
    with cut_off.open("ab") as file:
        file.write(b"\x18\x00\x00")
    fit_with_board(tmp_path, resume=True)
    require_curves_of_metrics(tmp_path)
    assert list(pictures(tmp_path, board.SAMPLES)) == [7, 14, 21, 28]


def test_what_was_trained_without_it_is_added(tmp_path: Path) -> None:
    """On, off, on: the second time the curves get what they lack. And a finished run gets all of them."""
    config = tiny_config(**CONSTANT)
    for epochs, wanted in ((2, True), (3, False), (4, True)):
        longer = config.with_changes(optimiser={"epochs": epochs})
        fit(longer, tmp_path / "a", resume=True, tensorboard=wanted, data=tiny_data())
    require_curves_of_metrics(tmp_path / "a")
    fit(config, tmp_path / "b", data=tiny_data())
    assert not (tmp_path / "b" / board.FOLDER).exists()
    for _ in range(2):
        fit_with_board(tmp_path / "b", config, resume=True)
        require_curves_of_metrics(tmp_path / "b")


def test_it_changes_nothing_in_the_training(tmp_path: Path) -> None:
    fit_with_board(tmp_path / "with")
    fit(tiny_config(), tmp_path / "without", data=tiny_data())
    weights = "checkpoints/epoch-0004/weights.safetensors"
    assert (tmp_path / "with" / weights).read_bytes() == (tmp_path / "without" / weights).read_bytes()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`vaeserve-train fit` of a tiny model in a folder of its own."""
    data = tiny_data()
    np.savez(tmp_path / "images.npz", train_images=data.train[:, 0], test_images=data.test[:, 0])
    config = tiny_config(data={"dataset": "arrays", "path": Path("images.npz")})
    (tmp_path / "tiny.json").write_text(config.to_json())
    monkeypatch.chdir(tmp_path)
    return ["fit", "--config", "tiny.json", "--run-dir", "run", "--tensorboard", "--quiet"]


def test_ctrl_c_says_the_command_that_goes_on_with_it(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    take_step = Trainer._step

    def step_and_interrupt(trainer: Trainer, *arguments: object) -> None:
        take_step(trainer, *arguments)
        if trainer.progress.step == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", step_and_interrupt)
        assert main(command) == 130
    again = capfd.readouterr().out.splitlines()[-1].split()
    assert again == ["vaeserve-train", "fit", "--run-dir", "run", "--resume", "--tensorboard"]
    assert main([*again[1:], "--quiet"]) == 0
    assert capfd.readouterr().err == ""
    require_curves_of_metrics(Path("run"))


def test_without_the_extra_it_is_one_line_before_anything_is_written(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(command) == 1
    wanted = 'TensorBoard is not installed: pip install "vaeserve[training,tensorboard]"'
    assert capsys.readouterr().err == f"vaeserve-train fit: {wanted}\n"
    assert not Path("run").exists()
