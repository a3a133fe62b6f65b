from __future__ import annotations

from pathlib import Path

import pytest

from vaeserve_training.config import PRESETS, ConfigError, TrainConfig, differences, preset


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_keeps_every_field(name: str) -> None:
    config = preset(name).with_changes(data={"path": Path("some/images"), "limit_train": 5})
    assert TrainConfig.from_json(config.to_json()) == config


def test_a_part_of_a_configuration_keeps_the_other_defaults() -> None:
    config = TrainConfig.from_json('{"optimiser": {"epochs": 3}}')
    assert config == TrainConfig().with_changes(optimiser={"epochs": 3})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"optimiser": {"epochs": 0}}', "optimiser.epochs"),
        ('{"optimiser": {"epoch": 3}}', "optimiser.epoch"),
        ('{"optimiser": {"learning_rate": 1e999}}', "optimiser.learning_rate"),
        ('{"data": {"image_shape": [1, 30, 28]}}', "multiples of 4"),
        ('{"data": {"image_shape": [3, 32]}}', "data.image_shape"),
        (
            '{"objective": {"bound": "iwae", "beta": 2}}',
            "given are likelihood bernoulli, beta 2 and rate_warmup_steps 0",
        ),
        ('{"model": {"channels": [], "blocks": 2}}', "blocks is 2, but there are no channels"),
        ('{"objective": {"likelihood": "cross-entropy"}}', "'bernoulli', 'gaussian' or 'mse'"),
        ("{", "JSON"),
    ],
)
def test_an_unusable_configuration_is_told_in_one_line_with_file_and_field(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_json(text, "some.json")
    message = str(caught.value)
    assert message.startswith("some.json: ")
    assert words in message
    assert "\n" not in message


def test_changes_are_validated() -> None:
    with pytest.raises(ConfigError, match=r"optimiser\.epochs.*-1"):
        preset("mnist").with_changes(optimiser={"epochs": -1})
    with pytest.raises(ConfigError, match="multiples of 8"):
        preset("rgb").with_changes(data={"image_shape": (3, 36, 36)})


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="mnist, mnist-mlp, rgb"):
        preset("imagenet")


def test_differences_name_the_fields_that_change_a_run_and_no_others() -> None:
    one = preset("mnist")
    other = one.with_changes(
        optimiser={"epochs": 99, "learning_rate": 1.0},
        data={"path": Path("elsewhere"), "cache_dir": Path("there")},
        run={"keep_checkpoints": 7, "seed": 1, "monitor_images": 0},
    )
    assert differences(one, other) == ["optimiser.epochs", "optimiser.learning_rate", "run.seed"]
    assert differences(one, one) == []
