"""The Node.js example, as its reader runs it: Node's own processes, its own packages, and the very same numbers.

Needs node, and what `make node` installs beside the example (npm's packages, as locked).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving import running_server
from vaeserve import Client

EXAMPLE = Path(__file__).parents[2] / "client" / "examples" / "node"
PACKAGE = json.loads((EXAMPLE / "package.json").read_text())
LOCK = json.loads((EXAMPLE / "package-lock.json").read_text())
COUNT, SEED = 8, 7


def tour(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on the path (on Debian: packages nodejs and npm)")
    if not (EXAMPLE / "node_modules").is_dir():
        pytest.skip("the example's packages are not installed: `make node` does that")
    return subprocess.run([node, "tour.js", *arguments], cwd=EXAMPLE, capture_output=True, text=True, timeout=60)  # noqa: PLW1510


def test_tour_gets_what_a_python_client_gets(models_dir: Path, tmp_path: Path) -> None:
    picture = tmp_path / "samples.pgm"
    with running_server(models_dir) as server:
        done = tour(server.target, picture)
        with Client(server.target) as client:
            samples = client.sample(COUNT, seed=SEED, dtype=np.uint8).images
            codes = client.encode(samples)
            copies = client.decode(codes)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.array_equal(np.asarray(Image.open(picture)).reshape(samples.shape), samples)
    number = r"(-?[\d.]+)"
    said = re.search(rf"encode: mean \[8,20\], first latent {number} \+- {number}", done.stdout)
    assert said is not None, done.stdout
    assert [float(value) for value in said.groups()] == pytest.approx([codes.mean[0, 0], codes.stddev[0, 0]], abs=1e-4)
    said = re.search(rf"decode: \[8,1,28,28\], {number} from", done.stdout)
    assert said is not None, done.stdout
    assert float(said[1]) == pytest.approx(np.abs(copies - samples / 255).mean(), abs=1e-4)


def test_tour_shows_errors_with_their_details(models_dir: Path) -> None:
    with running_server(models_dir) as server:
        said = tour(server.target).stdout
    wrong_shape = "images have shape (3, 5, 7); model mnist/1 takes (1, 28, 28)"
    assert f"INVALID_ARGUMENT: {wrong_shape}\n" in said
    assert f"field images: {wrong_shape}\n" in said
    assert "FAILED_PRECONDITION: the request is for digest '000" in said
    assert "reason: DIGEST_MISMATCH\n" in said
    assert re.search(r"call \S+: \d+ us in the queue, [1-9]\d* us in the graph\n", said), said


def test_nobody_there_is_one_line() -> None:
    done = tour("127.0.0.1:1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"127\.0\.0\.1:1: UNAVAILABLE: .*\n", done.stderr)


def test_versions_are_pinned_and_come_from_wherever_npm_is_told() -> None:
    """A lock file with addresses in it would bind everybody to the registry of whoever wrote it."""
    locked = LOCK["packages"]
    assert locked[""]["dependencies"] == PACKAGE["dependencies"]
    for name, version in PACKAGE["dependencies"].items():
        assert locked[f"node_modules/{name}"]["version"] == version
    packages = {name: entry for name, entry in locked.items() if name}
    assert [name for name, entry in packages.items() if "resolved" in entry] == []
    assert [name for name, entry in packages.items() if not entry["integrity"].startswith("sha512-")] == []


def test_example_reads_the_contract_that_is_here() -> None:
    (contract,) = re.findall(r"new URL\('(\S+\.proto)'", (EXAMPLE / "vaeserve.js").read_text())
    assert (EXAMPLE / contract).resolve() == EXAMPLE.parents[2] / "protos" / "vaeserve" / "v1" / "vae.proto"
