"""What tests share: a model that was really trained, for seconds, on the small subset of MNIST under tests/data."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

IN_PROCESS = "looks inside the server's process, which behind Envoy is another one"
MNIST_SUBSET = Path(__file__).parent / "data" / "mnist_subset.npz"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--transport", choices=["grpc", "envoy"], default="grpc", help="what carries the servers' calls")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and their processes would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--transport") != "grpc":
        import serving

        serving.default_transport = config.getoption("--transport")
    config.addinivalue_line("markers", f"in_process: {IN_PROCESS}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--transport") == "envoy":
        for item in items:
            if item.get_closest_marker("in_process"):
                item.add_marker(pytest.mark.skip(reason=IN_PROCESS))


@pytest.fixture(scope="session")
def test_images() -> NDArray[np.uint8]:
    """256 MNIST test images, uint8 [256, 1, 28, 28]."""
    with np.load(MNIST_SUBSET) as arrays:
        images: NDArray[np.uint8] = arrays["test_images"][:, None]
    return images


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of the default preset, trained on 1024 images."""
    from vaeserve_training.config import preset
    from vaeserve_training.fit import fit

    config = preset("mnist").with_changes(
        data={"dataset": "arrays", "path": MNIST_SUBSET},
        optimiser={"epochs": 3, "warmup_steps": 5},
        run={"threads": 1},
    )
    return fit(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def models_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with one bundle, mnist/1, exported from that checkpoint."""
    from vaeserve_training.export import export

    folder = tmp_path_factory.mktemp("models")
    export(checkpoint_dir, folder, name="mnist", version=1)
    return folder


@pytest.fixture(scope="session")
def float16_models_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with graphs in float16 in the bundle."""
    from vaeserve_training.export import export

    folder = tmp_path_factory.mktemp("float16")
    export(checkpoint_dir, folder, name="mnist", version=1, float16=True)
    return folder


@pytest.fixture(scope="session")
def evaluated_models_dir(checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its figures on the test images in the card, the latents' statistics among them."""
    from vaeserve_training import checkpoint, data
    from vaeserve_training.evaluate import evaluate
    from vaeserve_training.export import export

    model = checkpoint.load(checkpoint_dir)
    images = data.load(model.config.data)
    folder = tmp_path_factory.mktemp("evaluated")
    report = evaluate(model.vae, images, model.config.objective.likelihood)
    export(checkpoint_dir, folder, name="mnist", version=1, evaluation=report, data=images)
    return folder


@pytest.fixture(scope="session")
def bundle_dir(models_dir: Path) -> Path:
    """That bundle's folder."""
    return models_dir / "mnist" / "1"
