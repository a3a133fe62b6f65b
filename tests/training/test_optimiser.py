from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from vaeserve_training.config import ObjectiveConfig, OptimiserConfig, preset
from vaeserve_training.optimiser import iwae_stage, learning_rate, rate_weight, update_average


def test_the_learning_rate_rises_linearly_then_falls_along_a_cosine_to_its_last_fraction() -> None:
    config = OptimiserConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.01)
    rates = [learning_rate(config, step, 111) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx((1 + 0.01) / 2)
    assert rates[-1] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_a_run_shorter_than_its_warm_up_never_divides_by_nothing() -> None:
    config = OptimiserConfig(learning_rate=1.0, warmup_steps=5)
    assert [learning_rate(config, step, 6) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_constant_schedule_stays() -> None:
    config = OptimiserConfig(learning_rate=0.5, warmup_steps=0, schedule="constant")
    assert {learning_rate(config, step, 50) for step in range(50)} == {0.5}


def test_the_papers_schedule_has_eight_stages_of_3280_epochs() -> None:
    stages = [iwae_stage(epoch) for epoch in range(3280)]
    assert [stages.count(stage) for stage in range(9)] == [1, 3, 9, 27, 81, 243, 729, 2187, 0]
    assert stages == sorted(stages)


def test_a_shortened_schedule_is_the_beginning_of_the_papers() -> None:
    paper, short = (preset("iwae-paper").optimiser.model_copy(update={"epochs": epochs}) for epochs in (3280, 13))
    rates = [learning_rate(short, step, 13 * 10) for step in range(130)]
    assert rates == [learning_rate(paper, step, 3280 * 10) for step in range(130)]
    assert rates[:10] == pytest.approx([1e-3] * 10)
    assert rates[10:40] == pytest.approx([1e-3 * 10 ** (-1 / 7)] * 30)
    assert rates[40:] == pytest.approx([1e-3 * 10 ** (-2 / 7)] * 90)


def test_the_rate_weight_rises_to_beta() -> None:
    config = ObjectiveConfig(beta=2.0, rate_warmup_steps=4)
    assert [rate_weight(config, step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_the_average_follows_the_weights_with_a_decay_that_grows() -> None:
    module, average = nn.Linear(1, 1), nn.Linear(1, 1)
    config = OptimiserConfig(ema_decay=0.5)
    expected = average.weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            module.weight.fill_(float(step))
        update_average(config, average, module, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(average.weight.detach(), expected)
