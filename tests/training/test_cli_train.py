from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runs import tiny_config
from vaeserve_training import checkpoint, metrics
from vaeserve_training.__main__ import COMMANDS, main
from vaeserve_training.report import Report
from vaeserve_training.trainer import Trainer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with images.npz and tiny.json, the configuration of a tiny model of them."""
    images = np.random.default_rng(0).integers(0, 256, (130, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images[:100], test_images=images[100:])
    config = tiny_config(data={"dataset": "arrays", "path": Path("images.npz")})
    (tmp_path / "tiny.json").write_text(config.to_json())
    monkeypatch.chdir(tmp_path)
    return tmp_path


FIT = ["fit", "--config", "tiny.json", "--run-dir", "runs/a"]


def test_fit_evaluate_and_what_to_do_next(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FIT) == 0
    said = capsys.readouterr()
    assert "trained: runs/a/checkpoints/epoch-0004" in said.out
    assert "vaeserve-train evaluate --run-dir runs/a\n" in said.out
    assert "vaeserve-train export --run-dir runs/a --name arrays\n" in said.out
    assert "epoch 4/4: -ELBO" in said.err
    assert main(["evaluate", "--run-dir", "runs/a", "--iw-samples", "3"]) == 0
    said = capsys.readouterr()
    assert "importance-weighted NLL" in said.out
    assert "wrote runs/a/evaluation.json" in said.out
    found = Report.from_json(folder / "runs/a/evaluation.json")
    assert found.evaluations[0].iw_samples == 3
    assert found.weights_sha256 == checkpoint.load(folder / "runs/a").weights_sha256


def test_a_flag_outweighs_the_file_which_outweighs_the_preset(folder: Path) -> None:
    (folder / "part.json").write_text('{"optimiser": {"epochs": 1, "batch_size": 50}, "model": {"hidden": [9]}}')
    data = ["--data.dataset", "arrays", "--data.path", "images.npz", "--data.image-shape", "1,4,4"]
    flags = ["--preset", "mnist-mlp", "--config", "part.json", "--optimiser.batch_size", "40", "--model.latent-size=3"]
    assert main(["fit", "--run-dir", "runs/b", *flags, *data, "--quiet"]) == 0
    config = checkpoint.load(folder / "runs/b").config
    assert config.model.channels == ()  # the preset
    assert config.optimiser.learning_rate == 1e-3  # the preset
    assert config.optimiser.epochs == 1  # the file
    assert config.model.hidden == (9,)  # the file
    assert config.optimiser.batch_size == 40  # a flag
    assert config.model.latent_size == 3  # a flag


def test_quiet_says_nothing_but_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_saves_and_says_the_command_that_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_step = Trainer._step

    def step_and_interrupt(trainer: Trainer, *arguments: object) -> None:
        take_step(trainer, *arguments)
        if trainer.progress.step == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", step_and_interrupt)
        assert main(FIT) == 130
    said = capsys.readouterr().out
    assert "saved runs/a/checkpoints/epoch-0001-step-000003" in said
    command = said.splitlines()[-1].split()
    assert command == ["vaeserve-train", "fit", "--run-dir", "runs/a", "--resume"]
    assert main(command[1:]) == 0
    assert [record["epoch"] for record in metrics.read(folder / "runs/a" / metrics.FILE)] == [1, 2, 3, 4]


def test_ctrl_c_before_training_has_begun_says_the_same_command_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vaeserve_training.fit.load", interrupt)
    assert main([*FIT, "--quiet"]) == 130
    said = capsys.readouterr().out
    assert "no checkpoint was made yet" in said
    assert said.splitlines()[-1].split() == ["vaeserve-train", *FIT, "--quiet"]


def test_resuming_a_finished_run_says_the_same_and_trains_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(FIT) == 0
    first = capsys.readouterr()
    assert main([*FIT, "--resume"]) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert second.err == ""


USER_ERRORS = {
    "no run folder": (["fit"], "--run-dir is needed"),
    "unknown flag": ([*FIT, "--optimiser.epoch", "3"], "--optimiser.epoch"),
    "flag without a value": (["fit", "--run-dir"], "--run-dir: expected one argument"),
    "value of another type": ([*FIT, "--optimiser.epochs", "few"], "optimiser.epochs: Input should be a valid integer"),
    "value out of range": ([*FIT, "--optimiser.epochs", "0"], "optimiser.epochs: Input should be greater than"),
    "unknown preset": (["fit", "--run-dir", "x", "--preset", "nope"], "mnist, mnist-mlp, rgb"),
    "nothing to resume": (["fit", "--run-dir", "x", "--resume"], "x holds no run to resume"),
    "missing file": (["fit", "--run-dir", "x", "--config", "nope.json"], "cannot read nope.json"),
    "broken file": (["fit", "--run-dir", "x", "--config", "broken.json"], "broken.json: Invalid JSON"),
    "wrong shape": ([*FIT, "--data.image-shape", "1,5,4"], "multiples of 2"),
    "other shape than the data": ([*FIT, "--data.image-shape", "1,8,8"], "image_shape"),
    "missing data": ([*FIT, "--data.path", "nope.npz"], "nope.npz"),
    "data set without a path": (["fit", "--preset", "rgb", "--run-dir", "x"], "data.path"),
    "run folder is a file": ([*FIT[:-1], "images.npz"], "images.npz"),
    "no checkpoint": (["evaluate", "--run-dir", "nowhere"], "nowhere is no checkpoint"),
    "negative samples": (["evaluate", "--run-dir", "x", "--iw-samples", "-1"], "iw_samples"),
    "unknown device": (["evaluate", "--run-dir", "x", "--device", "tpu"], "device: Input should be 'auto', 'cuda'"),
    "unknown data set": (["data", "--data.dataset", "imagenet"], "data.dataset: Input should be"),
}


WRONG_BY_ITSELF = {
    "no run folder",
    "unknown flag",
    "flag without a value",
    "value of another type",
    "value out of range",
    "unknown preset",
    "wrong shape",
    "negative samples",
    "unknown device",
    "unknown data set",
}


@pytest.mark.parametrize("mistake", USER_ERRORS)
def test_a_users_mistake_gets_one_line_and_a_status(
    folder: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    arguments, words = USER_ERRORS[mistake]
    (folder / "broken.json").write_text("{")
    assert main(arguments) == (2 if mistake in WRONG_BY_ITSELF else 1)
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.startswith(f"vaeserve-train {arguments[0]}: ")
    assert said.err.count("\n") == 1


def test_a_run_is_not_overwritten_nor_resumed_under_another_configuration(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIT, "--quiet"]) == 0
    assert main(FIT) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main([*FIT, "--resume", "--objective.beta", "4"]) == 1
    assert "differs in objective.beta;" in capsys.readouterr().err


def test_a_diverging_run_stops_with_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--quiet", "--optimiser.learning-rate", "1e38", "--optimiser.warmup-steps", "0"]) == 1
    said = capsys.readouterr()
    assert "infinite or not a number" in said.err
    assert "Lower optimiser.learning_rate" in said.err
    assert said.err.count("\n") == 1


def test_cuda_where_there_is_none_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*FIT, "--run.device", "cuda"]) == 1
    assert "the device is cuda, but it does not work here" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_data_prints_a_summary_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.dataset", "arrays", "--data.path", "images.npz", "--data.image-shape", "1,4,4"]
    assert main(["data", *flags]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["train_images"] == 100
    assert summary["test_images"] == 30


@pytest.mark.parametrize("arguments", [[], ["nope"]])
def test_without_a_known_command_the_commands_are_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert ", ".join(COMMANDS) in capsys.readouterr().err


def test_help_lists_the_commands_and_each_commands_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        assert f"usage: vaeserve-train {name}" in capsys.readouterr().out


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_the_commands_module_imports_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import vaeserve_training.__main__; "
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(loaded - sys.stdlib_module_names))"
    )
    assert run_python(code).stdout == "['vaeserve_training']\n"


@pytest.mark.parametrize("missing", ["torch", "pydantic_settings", "safetensors"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from vaeserve_training.__main__ import main; "
        "sys.exit(main(['fit', '--run-dir', 'x']))"
    )
    finished = run_python(code)
    assert finished.returncode == 2
    assert finished.stderr == 'vaeserve-train needs the training extra: pip install "vaeserve[training]"\n'
