"""What tests share: a model that was really trained, for seconds, on the small subset of MNIST under tests/data."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

IN_PROCESS = "looks inside the server's process, which behind Envoy is another one"
TESTS = Path(__file__).parent
MNIST_SUBSET = TESTS / "data" / "mnist_subset.npz"
# The files that take longest. Side by side they begin first, or at the end one core would wait for another.
LONGEST = (
    "training/test_ladder.py",
    "server/test_workers.py",
    "training/test_export.py",
    "training/test_fit.py",
    "training/test_prior.py",
    "training/test_export_parity.py",
    "test_no_connections.py",
    "test_readme.py",
    "server/test_lifecycle.py",
    "server/test_transport_envoy.py",
    "client/test_quickstart.py",
    "deploy/test_release.py",
)
# What `make test` leaves to jobs of their own, test-ladder, test-faults and test-envoy: half of the processor time.
JOBS = {
    "ladder": (
        "training/test_ladder.py",
        "training/test_ladder_estimators.py",
        "training/test_ladder_full.py",
        "training/test_large.py",
        "training/test_prior.py",
    ),
    "faults": (
        "benchmarks/test_benchmarks.py",
        "benchmarks/test_overload_command.py",
        "server/test_bombs.py",
        "server/test_cancel_storm.py",
        "server/test_faults.py",
        "server/test_fuzz.py",
        "server/test_overload.py",
        "server/test_reload.py",
        "server/test_rolling_restart.py",
        "server/test_trial.py",
        "server/test_workers.py",
        "soak/test_soak.py",
        "test_no_connections.py",
        "test_no_pickle.py",
    ),
    "envoy": ("server/test_transport_envoy.py",),
}
_JOB_OF = {TESTS / name: job for job, names in JOBS.items() for name in names}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--transport", choices=["grpc", "envoy"], default="grpc", help="what carries the servers' calls")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait, for a process or a clock."""
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the tests in the background has them ignore Ctrl-C, and their processes would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--transport") != "grpc":
        import serving

        serving.default_transport = config.getoption("--transport")
    config.addinivalue_line("markers", f"in_process: {IN_PROCESS}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Spare the import of files all of whose tests `-m` leaves out."""
    job = _JOB_OF.get(collection_path)
    return True if job and f"not {job}" in config.getoption("markexpr") else None


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path in _JOB_OF:
            item.add_marker(_JOB_OF[item.path])
    if config.getoption("--transport") == "envoy":
        for item in items:
            if item.get_closest_marker("in_process"):
                item.add_marker(pytest.mark.skip(reason=IN_PROCESS))
    if hasattr(config, "workerinput"):
        places = {TESTS / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


Shared = Callable[[str, Callable[[Path], Path]], Path]


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Make a folder of that name once for all of xdist's processes, which only read it; return what `make` returned."""
    alone = not hasattr(request.config, "workerinput")
    session = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent

    def find_or_make(name: str, make: Callable[[Path], Path]) -> Path:
        made = session / f"shared-{name}.txt"
        with (session / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                made.write_text(str(make(tmp_path_factory.mktemp(name))))
        return Path(made.read_text())

    return find_or_make


@pytest.fixture(scope="session")
def test_images() -> NDArray[np.uint8]:
    """256 MNIST test images, uint8 [256, 1, 28, 28]."""
    with np.load(MNIST_SUBSET) as arrays:
        images: NDArray[np.uint8] = arrays["test_images"][:, None]
    return images


@pytest.fixture(scope="session")
def checkpoint_dir(shared: Shared) -> Path:
    """The last checkpoint of the default preset, trained on 1024 images."""

    def train(folder: Path) -> Path:
        from vaeserve_training.config import preset
        from vaeserve_training.fit import fit

        config = preset("mnist").with_changes(
            data={"dataset": "arrays", "path": MNIST_SUBSET},
            optimiser={"epochs": 3, "warmup_steps": 5},
            run={"threads": 1},
        )
        return fit(config, folder)

    return shared("run", train)


def _exported(checkpoint_dir: Path, folder: Path, **options: Any) -> Path:
    from known_graphs import operators_read_once
    from vaeserve_training.export import export

    with operators_read_once():
        export(checkpoint_dir, folder, name="mnist", version=1, **options)
    return folder


def _exported_again(checkpoint_dir: Path, bundle_dir: Path, folder: Path, **options: Any) -> Path:
    """Export with the graphs that the bundle has."""
    from known_graphs import reuse_graphs

    with pytest.MonkeyPatch.context() as patched:
        reuse_graphs(bundle_dir, patched)
        return _exported(checkpoint_dir, folder, **options)


@pytest.fixture(scope="session")
def models_dir(checkpoint_dir: Path, shared: Shared) -> Path:
    """A models folder with one bundle, mnist/1, exported from that checkpoint."""
    return shared("models", lambda folder: _exported(checkpoint_dir, folder))


@pytest.fixture(scope="session")
def float16_models_dir(checkpoint_dir: Path, bundle_dir: Path, shared: Shared) -> Path:
    """The same with graphs in float16 in the bundle."""
    return shared("float16", lambda folder: _exported_again(checkpoint_dir, bundle_dir, folder, float16=True))


@pytest.fixture(scope="session")
def evaluated_models_dir(checkpoint_dir: Path, bundle_dir: Path, shared: Shared) -> Path:
    """The same with its figures on the test images in the card, the latents' statistics among them."""

    def evaluate_and_export(folder: Path) -> Path:
        from vaeserve_training import checkpoint, data
        from vaeserve_training.evaluate import evaluate

        model = checkpoint.load(checkpoint_dir)
        images = data.load(model.config.data)
        report = evaluate(model.vae, images, model.config.objective.likelihood)
        return _exported_again(checkpoint_dir, bundle_dir, folder, evaluation=report, data=images)

    return shared("evaluated", evaluate_and_export)


@pytest.fixture(scope="session")
def bundle_dir(models_dir: Path) -> Path:
    """That bundle's folder."""
    return models_dir / "mnist" / "1"
