"""README's commands for the preset `large`, which is for a GPU: as far as a CPU can tell, they work.

They run as they stand, but for the network's size, the lengths, and a static binarisation of 180 images. That it learns
is in test_fit.py, that a fitted prior is better in test_prior.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serving import running_server
from vaeserve import Client
from vaeserve_training import bundle, checkpoint, mnist
from vaeserve_training.__main__ import main
from vaeserve_training.config import preset

ROOT = Path(__file__).parents[2]
SMALLER = {
    "fit": "--model.channels 4,8 --model.blocks 1 --model.hidden 16 --model.latent-size 6 --optimiser.epochs 2 "
    "--optimiser.batch-size 10 --optimiser.warmup-steps 2 --objective.rate-warmup-steps 2 "
    "--optimiser.learning-rate 3e-3 --run.precision bf16 --run.threads 1 --run.device cpu --quiet",
    "fit-prior": "--prior.couplings 2 --prior.steps 60 --prior.hidden 16 --prior.learning-rate 3e-3 --threads 1 "
    "--quiet",
    "evaluate": "--device cpu --quiet",
    "export": "--quiet",
}


@pytest.fixture
def static_folder(tmp_path: Path, test_images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a static binarisation like the published one, of 120, 20 and 40 images."""
    bits = (test_images[:180, 0] > 127).astype(np.uint8).reshape(180, -1)
    parts = dict(zip(("train", "valid", "test"), np.split(bits, [120, 140]), strict=True))
    for part, rows in parts.items():
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        monkeypatch.setitem(mnist.STATIC_PARTS, part, (len(rows), hashlib.sha256(text.encode()).hexdigest()))
    folder = tmp_path / "FOLDER"
    folder.mkdir()
    np.savez(folder / mnist.PACKED_NAME, **{part: np.packbits(rows, axis=1) for part, rows in parts.items()})
    return folder


@pytest.mark.usefixtures("static_folder")
def test_the_commands_for_large_train_judge_and_publish_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```bash large\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line.replace("--iw-samples 5000", "--iw-samples 50")) for line in block.splitlines()]
    assert [words[:2] for words in lines] == [["vaeserve-train", command] for command in SMALLER]
    for words in lines:
        assert main([*words[1:], *shlex.split(SMALLER[words[1]])]) == 0

    run = Path("runs/large")
    config = checkpoint.load(run).config
    smaller = {"channels": (), "blocks": 1, "hidden": (), "latent_size": 0}
    assert config.model.model_dump() | smaller == preset("large").model.model_dump() | smaller
    standard, fitted = json.loads((run / "evaluation.json").read_text())["evaluations"]
    for evaluation in (standard, fitted):
        assert "40 test images of binarised-mnist; static binarisation" in evaluation["protocol"]
        assert "importance-weighted NLL with k = 50" in evaluation["protocol"]
        assert evaluation["iw_samples"] == 50
    assert fitted["protocol"].endswith("prior: the fitted one; importance-weighted NLL with k = 50")
    assert fitted["iw_nll_nats"] != standard["iw_nll_nats"]
    assert fitted["distortion_nats"] == standard["distortion_nats"]

    card = bundle.read_card(Path("models/large/1"))
    assert [graph.file for graph in card.graphs] == ["encoder.onnx", "decoder.onnx", "prior.onnx"]
    with running_server(Path("models")) as server, Client(server.target) as client:
        from_fitted = client.sample(5, seed=7, prior="fitted")
        from_standard = client.sample(5, seed=7)
    assert from_fitted.images.shape == (5, 1, 28, 28)
    assert not np.allclose(from_fitted.latents, from_standard.latents, atol=0.01)
