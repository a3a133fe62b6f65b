"""Versions that are tried in a process of their own first: what kills that process is refused, and the server lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bundles import ENCODER, aborting_encoder, encoder, endless_on_zeros, write_bundle
from metrics_page import scrape_until
from serving import running_server
from vaeserve import Client
from vaeserve_server import trial
from vaeserve_server.bundle import read_bundle
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings

IMAGE, LATENT = (1, 4, 4), (3,)


def publish(models: Path, version: str, **options: Any) -> Path:
    made = write_bundle(models.parent / "staging", version=version, image_shape=IMAGE, latent_shape=LATENT, **options)
    (models / "mnist").mkdir(parents=True, exist_ok=True)
    return made.rename(models / "mnist" / version)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    publish(folder, "1")
    return folder


def attempt(models: Path, version: str, **settings: Any) -> None:
    trial.attempt(Settings(models=models, device="cpu", **settings), read_bundle(models, "mnist", version))


def test_a_version_that_onnx_runtime_dies_of_is_refused_and_the_server_serves_on(models: Path) -> None:
    with running_server(models, watch_s=0.05, try_first=True) as server, Client(server.target) as client:
        publish(models, "2", graphs={ENCODER: aborting_encoder(IMAGE, LATENT)})
        scrape_until(server, lambda page: page("vaeserve_refused_versions", model="mnist", version="2") == 1)
        assert client.sample(1).model.version == "1"
        publish(models, "3")
        scrape_until(server, lambda page: page("vaeserve_model_info", version="3") == 1)
        assert client.sample(1).model.version == "3"


def test_a_trial_says_how_it_went(models: Path) -> None:
    attempt(models, "1")
    publish(models, "2", graphs={ENCODER: aborting_encoder(IMAGE, LATENT)})
    with pytest.raises(
        StartError, match=r"^mnist/2 cannot be loaded: the process that tried it ended with signal SIGABRT$"
    ):
        attempt(models, "2")
    swapped = publish(models, "3", graphs={ENCODER: encoder(IMAGE, (4,))})
    with pytest.raises(StartError, match=r"encoder\.onnx: the graph gives mean tensor\(float\) \[N, 4\]") as refused:
        attempt(models, "3")
    assert str(refused.value).startswith(str(swapped))
    publish(models, "4", graphs={ENCODER: endless_on_zeros(IMAGE, LATENT)})
    with pytest.raises(StartError, match=r"the graph's run on 1 rows does not end within 0\.2 s"):
        attempt(models, "4", watchdog_s=0.2)


def test_what_was_tried_is_what_is_loaded(models: Path, tmp_path: Path) -> None:
    folder = models / "mnist" / "1"
    read = read_bundle(models, "mnist", "1")
    folder.rename(tmp_path / "old")
    publish(models, "1", digest="e" * 64)
    with pytest.raises(StartError, match=r"^mnist/1 changed while it was tried$"):
        trial.attempt(Settings(models=models, device="cpu"), read)
