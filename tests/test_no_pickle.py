"""No pickle is loaded anywhere: not by any line of the packages, and not by anything they call on the way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for part in ("client", "server", "training") for path in (ROOT / part).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
HARMLESS = {"UnpicklingError"}  # what torch.load raises for what it refuses
# What unpickles unless it is told not to, and what must be said.
LOADERS = {"load": {("torch", "weights_only", True), ("np", "allow_pickle", False), ("numpy", "allow_pickle", False)}}


def pickling(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the words of whatever could load a pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] in FORBIDDEN_MODULES:
                    yield node.lineno, f"import {name.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FORBIDDEN_MODULES:
            for name in node.names:
                if name.name not in HARMLESS:
                    yield node.lineno, f"from {node.module} import {name.name}"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, words) for words in loading(node))


def loading(call: ast.Call) -> Iterator[str]:
    target = call.func
    if isinstance(target, ast.Name) and target.id in {"eval", "exec", "__import__"}:
        yield target.id
    if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
        return
    if target.attr == "full_load" or (target.value.id, target.attr) == ("yaml", "load"):
        yield ast.unparse(call)
    for module, keyword, value in LOADERS.get(target.attr, ()):
        given = {each.arg: each.value for each in call.keywords}
        if target.value.id == module and ast.unparse(given.get(keyword, ast.Constant(None))) != str(value):
            yield f"{ast.unparse(call)} without {keyword}={value}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_could_load_a_pickle(path: Path) -> None:
    assert list(pickling(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert list(pickling(ast.parse(line)))


LIFE = """
import os
import sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path[:0] = sys.argv[2:]
import numpy as np
import vaeserve
from known_graphs import operators_read_once
from runs import tiny_config
from serving import running_server
from vaeserve_training import checkpoint, data, evaluate, prior_fit
from vaeserve_training.config import PriorConfig
from vaeserve_training.export import export
from vaeserve_training.fit import fit

images = np.random.default_rng(0).integers(0, 256, (130, 4, 4), dtype=np.uint8)
np.savez(folder / "images.npz", train_images=images[:100], test_images=images[100:])
config = tiny_config(data={"dataset": "arrays", "path": folder / "images.npz"}, optimiser={"schedule": "iwae"})
found = set()
def hook(event, arguments):
    if event == "pickle.find_class":
        found.add(".".join(arguments))
sys.addaudithook(hook)
import pickle
pickle.loads(b"cdatetime\\ndate\\n.")  # so that it is known to hear
assert found == {"datetime.date"}
fit(config.with_changes(optimiser={"epochs": 2}), folder / "run")
path = fit(config, folder / "run", resume=True)
model = checkpoint.load(path)
images = data.load(config.data)
prior = prior_fit.fit_prior(model, images, PriorConfig(couplings=2, steps=2))
prior_fit.save(prior, prior_fit.default_path(model.path))
report = evaluate.evaluate(model.vae, images, config.objective.likelihood)
with operators_read_once():
    export(path, folder / "models", name="tiny", evaluation=report, prior=prior_fit.load_for(model), data=images)
with running_server(folder / "models", transport="grpc") as server, vaeserve.Client(server.target) as client:
    client.decode(client.encode(np.zeros((2, 1, 4, 4), np.uint8)))
    client.sample(2, prior="fitted")
print(sorted(found), flush=True)
os._exit(0)  # grpcio's own threads may hold up an end that nobody waits for
"""


def test_nothing_is_unpickled_from_training_to_serving(tmp_path: Path) -> None:
    tests = ROOT / "tests"
    folders = [str(tests), str(tests / "training")]
    command = [sys.executable, "-W", "ignore", "-c", LIFE, str(tmp_path), *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "['datetime.date']\n"
