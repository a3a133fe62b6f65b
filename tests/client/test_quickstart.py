"""The tour of `make run`: with a model there it trains nothing, draws and measures everything, and ends well."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import MNIST_SUBSET

SCRIPT = Path(__file__).parents[2] / "client" / "examples" / "quickstart.py"
KEYS = {
    "neg_elbo_nats",
    "rate_nats",
    "distortion_nats",
    "active_units",
    "training_s",
    "total_s",
    "parity_max_abs_error",
    "provider",
    "encode_images_per_s",
    "decode_images_per_s",
    "onnxruntime_encode_images_per_s",
    "onnxruntime_decode_images_per_s",
}


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toured(models_dir, tmp_path_factory):
    """The tour with a trained model, as a process: its folder of runs and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    command = [sys.executable, SCRIPT, "--models", models_dir, "--runs", runs, "--data", MNIST_SUBSET]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs, done.stdout


def test_the_summary_has_every_figure(toured, models_dir):
    runs, _ = toured
    summary = json.loads((runs / "quickstart" / "summary.json").read_text())
    card = json.loads((models_dir / "mnist" / "1" / "model.json").read_text())
    assert summary.keys() >= KEYS
    assert summary["digest"] == card["digest"]
    assert summary["provider"] == "CPUExecutionProvider"
    assert summary["parity_max_abs_error"] == max(
        parity["max_abs_error"] for graph in card["graphs"] for parity in graph["parity"]
    )
    assert summary["training_s"] is None  # this model was not trained in these runs
    for key in KEYS:
        assert not key.endswith("_per_s") or summary[key] > 0


def test_the_pictures_can_be_seen(toured):
    runs, _ = toured
    for name in ("reconstructions.png", "samples.png", "latent_space.png"):
        with Image.open(runs / "quickstart" / name) as picture:
            assert min(picture.size) > 100
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20  # not one flat colour


def test_nothing_was_trained_and_the_server_is_gone(toured):
    runs, printed = toured
    assert [path.name for path in runs.iterdir()] == ["quickstart"]
    assert "vaeserve-train" not in printed
    assert "encode through the SDK" in printed
    assert (runs / "quickstart" / "server.log").read_text().rstrip().endswith("stopped")


def test_without_a_model_it_asks_the_trainer_for_what_the_trainer_takes(quickstart, tmp_path, monkeypatch):
    from vaeserve_training import checkpoint
    from vaeserve_training.commands.evaluate import EvaluateFlags
    from vaeserve_training.commands.export import ExportFlags
    from vaeserve_training.commands.fit import FitFlags
    from vaeserve_training.commands.flags import parse

    asked = []
    monkeypatch.setattr(quickstart, "trainer", lambda *arguments: asked.append(arguments))
    options = quickstart.parse(["--runs", str(tmp_path), "--epochs", "3", "--data", str(MNIST_SUBSET)])
    quickstart.train(options, tmp_path / "mnist")
    (tmp_path / "mnist").mkdir()  # as a run leaves it that was killed at its very beginning
    quickstart.train(options, tmp_path / "mnist")
    (tmp_path / "mnist" / checkpoint.CONFIG).write_text("{}")
    quickstart.train(options, tmp_path / "mnist")
    assert [command for command, *_ in asked] == ["fit", "evaluate", "export"] * 3
    fits = [parse(FitFlags, "fit", arguments[1:]) for arguments in (asked[0], asked[3], asked[6])]
    for flags in fits:
        assert (flags.data.dataset, flags.data.path, flags.optimiser.epochs) == ("arrays", MNIST_SUBSET, 3)
    assert [flags.resume for flags in fits] == [False, False, True]
    assert parse(EvaluateFlags, "evaluate", asked[1][1:]).run_dir == tmp_path / "mnist"
    assert parse(ExportFlags, "export", asked[2][1:]).models == options.models


def test_a_failed_step_is_told_and_ends_the_tour(quickstart, tmp_path, capfd):
    status = quickstart.main(
        ["--models", str(tmp_path / "models"), "--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "none.npz")]
    )
    assert status == 1
    assert "quickstart: `vaeserve-train fit` failed with exit status 1" in capfd.readouterr().err


def test_a_server_that_cannot_start_is_told_with_its_last_words(quickstart, tmp_path):
    with (
        pytest.raises(quickstart.StepError, match=r"the server did not start; it last said: .*server\.log"),
        quickstart.serving(tmp_path / "none", tmp_path / "server.log"),
    ):
        pass


def test_training_time_is_that_of_the_run(quickstart, tmp_path):
    assert quickstart.training_s(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 1.5}\n{"epoch": 2, "seconds": 2.25}\n')
    assert quickstart.training_s(tmp_path) == 3.75


def test_the_encoder_gets_what_it_was_trained_on(quickstart):
    from types import SimpleNamespace

    images = np.tile(np.arange(256, dtype=np.uint8), (400, 1)).reshape(400, 1, 16, 16)
    grey = quickstart.as_encoder_input(images, SimpleNamespace(encoder_input="grey"))
    binarised = quickstart.as_encoder_input(images, SimpleNamespace(encoder_input="binarised"))
    np.testing.assert_array_equal(grey, images)
    assert set(np.unique(binarised)) == {0, 255}
    np.testing.assert_allclose(binarised.mean(axis=0), images[0], atol=5 * 0.5 * 255 / np.sqrt(400))  # 5 sigma
