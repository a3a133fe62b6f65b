from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from killer import Killer
from runs import tiny_config, tiny_data, warm_up
from same_run import Kill, assert_same_run, everything, records
from vaeserve_training import checkpoint, metrics, objectives
from vaeserve_training.bundle import read_card
from vaeserve_training.config import TrainConfig, preset
from vaeserve_training.data import ImageData
from vaeserve_training.evaluate import optimal_sigma
from vaeserve_training.export import export
from vaeserve_training.fit import InterruptedTrainingError, fit
from vaeserve_training.models import INITIAL_SIGMA, GatedBlock, Vae
from vaeserve_training.trainer import DivergedError, FitError, Trainer


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that was never interrupted, and how many function calls it took."""
    warm_up()
    killer = Killer("calls:-1")
    sys.setprofile(killer)
    try:
        path = fit(tiny_config(), tmp_path_factory.mktemp("reference"), data=tiny_data())
    finally:
        sys.setprofile(None)
    return path, killer.seen


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(
    tmp_path: Path, reference: tuple[Path, int], kill: Kill
) -> None:
    uninterrupted, calls = reference
    rng = random.Random(20)
    reached = []
    for least, most in ((0.3, 0.6), (0.05, 0.25)):
        kill(tmp_path, f"calls:{rng.randint(int(least * calls), int(most * calls))}")
        reached.append(checkpoint.latest_position(tmp_path))
    assert reached[0] > (0, 0)  # the first kill lost an epoch's part, not the whole run
    assert reached == sorted(reached)
    assert_same_run(fit(tiny_config(), tmp_path, resume=True, data=tiny_data()), uninterrupted)


@pytest.mark.parametrize("kill_at", ["fsync:9", "rename:3"])
def test_a_run_killed_while_it_publishes_ends_with_the_same_weights(
    tmp_path: Path, reference: tuple[Path, int], kill: Kill, kill_at: str
) -> None:
    kill(tmp_path, kill_at)
    path = fit(tiny_config(), tmp_path, resume=True, data=tiny_data())
    assert_same_run(path, reference[0])
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["epoch-0003", "epoch-0004"]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Trainer], None]) -> None:
    """Let `act` happen right after that step (from 1) of the next run."""
    take_step = Trainer._step

    def step_and_act(trainer: Trainer, batch: torch.Tensor, step_in_epoch: int) -> None:
        take_step(trainer, batch, step_in_epoch)
        if trainer.progress.step + 1 == step:
            act(trainer)

    monkeypatch.setattr(Trainer, "_step", step_and_act)


def press_ctrl_c(_trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [3, 14, 20])
def test_ctrl_c_saves_that_very_step_and_the_run_goes_on_exactly(
    tmp_path: Path, reference: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        at_step(patched, step, press_ctrl_c)
        with pytest.raises(InterruptedTrainingError) as caught:
            fit(tiny_config(), tmp_path, data=tiny_data())
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.value.checkpoint is not None
    assert checkpoint.read_header(caught.value.checkpoint).progress.step == step
    assert_same_run(fit(tiny_config(), tmp_path, resume=True, data=tiny_data()), reference[0])


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_twice(_trainer: Trainer) -> None:
        press_ctrl_c(_trainer)
        press_ctrl_c(_trainer)

    at_step(monkeypatch, 10, press_twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(tiny_config(), tmp_path, data=tiny_data())
    assert not isinstance(caught.value, InterruptedTrainingError)
    assert [path.name for path in checkpoint.all_of(tmp_path)] == ["epoch-0001"]


def test_training_works_outside_the_main_thread(tmp_path: Path, reference: tuple[Path, int]) -> None:
    paths: list[Path] = []
    thread = threading.Thread(target=lambda: paths.append(fit(tiny_config(), tmp_path, data=tiny_data())))
    thread.start()
    thread.join()
    assert_same_run(paths[0], reference[0])


def test_another_seed_gives_another_run(tmp_path: Path, reference: tuple[Path, int]) -> None:
    other = everything(fit(tiny_config(run={"seed": 1}), tmp_path, data=tiny_data()))
    name = f"{checkpoint.WEIGHTS}/encoder.head.weight"
    assert not torch.equal(other[name], everything(reference[0])[name])


def test_resuming_a_finished_run_changes_nothing_and_needs_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fit(tiny_config(), tmp_path, data=tiny_data())
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr("vaeserve_training.fit.load", None)
    assert fit(tiny_config(), tmp_path, resume=True) == path
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    fit(tiny_config(), tmp_path, data=tiny_data())
    with pytest.raises(FitError, match=r"holds a run already \(epoch-0004\)"):
        fit(tiny_config(), tmp_path, data=tiny_data())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"optimiser": {"epochs": 5}}, "optimiser.epochs (the learning rate's schedule is laid out over all epochs)"),
        ({"optimiser": {"learning_rate": 1e-4}}, "optimiser.learning_rate"),
        ({"objective": {"beta": 2.0}}, "objective.beta"),
        ({"run": {"seed": 3}}, "run.seed"),
    ],
)
def test_resuming_under_another_configuration_names_the_field(
    tmp_path: Path, change: dict[str, dict[str, object]], field: str
) -> None:
    path = fit(tiny_config(), tmp_path, data=tiny_data())
    with pytest.raises(FitError) as caught:
        fit(tiny_config(**change), tmp_path, resume=True, data=tiny_data())
    assert f"differs in {field};" in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_run_whose_schedule_does_not_look_ahead_may_be_made_longer(tmp_path: Path) -> None:
    short, long = (tiny_config(optimiser={"schedule": "iwae", "epochs": epochs}) for epochs in (2, 4))
    fit(short, tmp_path / "grown", data=tiny_data())
    grown = fit(long, tmp_path / "grown", resume=True, data=tiny_data())
    assert_same_run(grown, fit(long, tmp_path / "at once", data=tiny_data()))
    with pytest.raises(FitError, match=r"differs in optimiser\.epochs"):
        fit(short, tmp_path / "grown", resume=True, data=tiny_data())


def half_white(shape: tuple[int, int, int]) -> ImageData:
    """Black and white images, one for one: a bit each, 0.69 nats, is all there is to know."""
    images = np.zeros((100, *shape), dtype=np.uint8)
    images[::2] = 255
    return replace(tiny_data(shape), train=images, test=images[:30])


def test_training_by_the_iwae_bound_lowers_it(tmp_path: Path) -> None:
    config = tiny_config(
        objective={"bound": "iwae", "samples": 5}, optimiser={"epochs": 20, "warmup_steps": 0, "learning_rate": 0.02}
    )
    first, *_, last = records(fit(config, tmp_path, data=half_white((1, 4, 4))))
    assert first["loss"] > 5
    assert math.log(2) < last["loss"] < 2
    assert last["loss"] < last["neg_elbo_nats"]  # of the same model, the tighter bound
    assert last["test_neg_elbo_nats"] == pytest.approx(last["test_distortion_nats"] + last["test_rate_nats"])


def test_resuming_on_other_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        at_step(patched, 3, press_ctrl_c)
        with pytest.raises(InterruptedTrainingError):
            fit(tiny_config(), tmp_path, data=tiny_data())
    with pytest.raises(FitError, match="SHA-256"):
        fit(tiny_config(), tmp_path, resume=True, data=tiny_data(seed=1))


def test_resuming_elsewhere_warns_that_it_is_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        at_step(patched, 3, press_ctrl_c)
        with pytest.raises(InterruptedTrainingError) as caught:
            fit(tiny_config(), tmp_path, data=tiny_data())
    assert caught.value.checkpoint is not None
    record = caught.value.checkpoint / checkpoint.PROGRESS
    content = json.loads(record.read_text())
    content["environment"]["threads"] = "64"
    record.write_text(json.dumps(content))
    caplog.clear()
    fit(tiny_config(), tmp_path, resume=True, data=tiny_data())
    assert "threads was 64, is 1" in caplog.text


def poison(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.vae.decoder.output_bias[0, 0, 0] = float("nan")


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 16, poison)
    with pytest.raises(DivergedError) as caught:
        fit(tiny_config(), tmp_path, data=tiny_data())
    assert "epoch 3, by step 17" in str(caught.value)
    assert str(checkpoint.latest(tmp_path)) in str(caught.value)
    kept = checkpoint.load(tmp_path)
    assert kept.progress.epoch == 2
    assert all(torch.isfinite(tensor).all() for tensor in kept.vae.state_dict().values())


def test_weights_poisoned_by_an_epochs_last_step_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 14, poison)
    with pytest.raises(DivergedError):
        fit(tiny_config(run={"monitor_images": 0}), tmp_path, data=tiny_data())
    assert [path.name for path in checkpoint.all_of(tmp_path)] == ["epoch-0001"]


def test_weights_that_spoil_held_out_images_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blow_up(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.vae.encoder.head.weight.fill_(1e38)

    at_step(monkeypatch, 14, blow_up)
    with pytest.raises(DivergedError):
        fit(tiny_config(optimiser={"ema_decay": 0.0}), tmp_path, data=tiny_data())
    assert [path.name for path in checkpoint.all_of(tmp_path)] == ["epoch-0001"]
    assert [record["epoch"] for record in metrics.read(tmp_path / metrics.FILE)] == [1]


def test_the_loss_is_distortion_plus_beta_times_rate(tmp_path: Path) -> None:
    last = {}
    for beta in (0.0, 1.0, 20.0):
        path = fit(tiny_config(objective={"beta": beta}), tmp_path / str(beta), data=tiny_data())
        last[beta] = records(path)[-1]
        expected = last[beta]["distortion_nats"] + beta * last[beta]["rate_nats"]
        assert last[beta]["loss"] == pytest.approx(expected, rel=1e-5)
        assert last[beta]["neg_elbo_nats"] == last[beta]["distortion_nats"] + last[beta]["rate_nats"]
    assert last[0.0]["rate_nats"] > last[1.0]["rate_nats"] > last[20.0]["rate_nats"]


@pytest.mark.parametrize("sigma", ["learned", "optimal"])
def test_a_gaussian_model_learns_its_sigma_and_saves_it(tmp_path: Path, sigma: str) -> None:
    config = tiny_config(objective={"likelihood": "gaussian", "sigma": sigma}, optimiser={"learning_rate": 0.02})
    path = fit(config, tmp_path, data=tiny_data())
    record = records(path)[-1]
    assert checkpoint.load(path).vae.sigma == record["sigma"]
    assert record["neg_elbo_nats"] < records(path)[0]["neg_elbo_nats"]
    best = optimal_sigma(checkpoint.load(path).vae, tiny_data().train)
    assert record["sigma"] == pytest.approx(best, rel=1e-6 if sigma == "optimal" else 0.2)
    assert record["sigma"] < 0.98 * INITIAL_SIGMA


def test_mse_has_a_loss_and_no_likelihood(tmp_path: Path) -> None:
    record = records(fit(tiny_config(objective={"likelihood": "mse"}), tmp_path, data=tiny_data()))[-1]
    assert record["loss"] == pytest.approx(record["mean_squared_error"] + record["rate_nats"], rel=1e-5)
    assert not {"neg_elbo_nats", "distortion_nats", "test_neg_elbo_nats"} & record.keys()


def test_without_an_average_the_weights_themselves_are_the_model(tmp_path: Path) -> None:
    path = fit(tiny_config(optimiser={"ema_decay": 0.0}), tmp_path, data=tiny_data())
    assert not (path / checkpoint.EMA).exists()
    saved = checkpoint.read_weights(path / checkpoint.WEIGHTS)
    for name, tensor in checkpoint.load(path).vae.state_dict().items():
        assert torch.equal(tensor, saved[name])


@pytest.mark.ladder
def test_the_preset_large_trains_in_bf16_and_its_export_is_exact(tmp_path: Path) -> None:
    config = preset("large").with_changes(
        data={"image_shape": (1, 8, 8)},
        model={"channels": (8, 16), "blocks": 1, "hidden": (16,)},
        optimiser={"epochs": 8, "batch_size": 10, "warmup_steps": 1, "learning_rate": 2e-3},
        run={"precision": "bf16", "threads": 1, "device": "cpu"},
    )
    data = half_white((1, 8, 8))
    path = fit(config, tmp_path / "run", data=data)
    first, *_, last = records(path)
    assert last["distortion_nats"] < first["distortion_nats"] / 2
    assert (path / checkpoint.EMA).is_file()
    blocks = [module for module in checkpoint.load(path).vae.modules() if isinstance(module, GatedBlock)]
    assert len(blocks) == 4
    published = read_card(export(path, tmp_path / "models", name="large", data=data))
    assert len(published.latent_shape) == 1
    assert all(0 < graph.parity[0].max_abs_error < 1e-4 for graph in published.graphs)


def test_bf16_networks_keep_float32_loss_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = set()
    compute_losses = objectives.losses

    def watched(
        vae: Vae, observation: objectives.Observation, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, objectives.Terms]:
        dtypes.add(("encoder", vae.encoder(observation.encoder_input)[0].dtype))
        losses, terms = compute_losses(vae, observation, *arguments, **options)
        dtypes.update(("terms", term.dtype) for term in (losses, terms.distortion, terms.rate))
        return losses, terms

    with monkeypatch.context() as patched:
        patched.setattr(objectives, "losses", watched)
        config = tiny_config(run={"precision": "bf16", "monitor_images": 0}, optimiser={"epochs": 1})
        path = fit(config, tmp_path, data=tiny_data())
    assert dtypes == {("encoder", torch.bfloat16), ("terms", torch.float32)}
    weights = checkpoint.read_weights(path / checkpoint.WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_training_leaves_the_threads_and_the_global_generator_alone(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    fit(tiny_config(), tmp_path, data=tiny_data())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_model_learns_real_digits(checkpoint_dir: Path) -> None:
    curve = [record["test_neg_elbo_nats"] for record in metrics.read(checkpoint_dir.parent.parent / metrics.FILE)]
    assert all(later < earlier for earlier, later in pairwise(curve))
    assert curve[-1] < 190  # independent pixels alone, the data set's mean, cost about 206 nats


def test_colour_images_train_too(tmp_path: Path) -> None:
    shape = (3, 8, 8)
    config: TrainConfig = tiny_config(
        data={"image_shape": shape}, model={"channels": (4, 4)}, objective={"likelihood": "gaussian"}
    )
    path = fit(config, tmp_path, data=tiny_data(shape))
    assert records(path)[-1]["neg_elbo_nats"] < records(path)[0]["neg_elbo_nats"]
