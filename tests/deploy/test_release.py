"""What is released: a wheel and an sdist that install and run where nothing of this checkout is on the path.

The new environment borrows third-party packages from this one, so that no network is needed; the project itself comes
from the archive alone (the editable install's .pth file is not among what is borrowed).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from vaeserve import __version__

REPOSITORY = Path(__file__).parents[2]
LIST_SOURCES = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may name a checkout
PACKAGES = {"vaeserve", "vaeserve_server", "vaeserve_training"}
SESSION = """
import numpy as np, sys
from vaeserve import Client
with Client(sys.argv[1]) as client:
    codes = client.encode(np.zeros((3, 28, 28), np.uint8))
    assert codes.mean.shape[0] == 3 and np.isfinite(codes.mean).all()
    assert client.decode(codes).shape == (3, 1, 28, 28)
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment in which the project was installed from one archive."""

    folder: Path

    def command(self, *words: str) -> list[str]:
        return [str(self.folder / "bin" / words[0]), *words[1:]]

    def run(self, *words: str) -> str:
        return _run(self.command(*words), cwd=self.folder)


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)], cwd=folder)
    return {"sdist": next(folder.glob("*.tar.gz")), "wheel": next(folder.glob("*.whl"))}


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def environment(
    request: pytest.FixtureRequest, archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """A new environment with the project from the archive."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    own = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet"]
    _run([sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(archives[request.param])], own)
    return Environment(folder)


def test_archives_hold_the_project_and_nothing_else(archives: dict[str, Path]) -> None:
    """Neither models, runs, environments and node_modules nor a package called `server` may slip in."""
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        members = wheel.namelist()
    information = f"vaeserve-{__version__}.dist-info"
    assert {member.split("/")[0] for member in members} == PACKAGES | {information}
    with tarfile.open(archives["sdist"]) as sdist:
        files_within = {str(Path(*Path(member.name).parts[1:])) for member in sdist.getmembers() if member.isfile()}
    assert files_within - {"PKG-INFO"} <= set(_run(LIST_SOURCES, cwd=REPOSITORY).splitlines())
    tops = {Path(file).parts[0] for file in files_within}
    folders = {"client", "protos", "server", "tests", "training"}
    files = {"CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
    assert tops == folders | files


def test_types_are_shipped(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        members = set(wheel.namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} | {"vaeserve/v1/vae_pb2.pyi"} <= members


def test_installed_packages_come_from_the_archive_and_carry_its_version(environment: Environment) -> None:
    found = json.loads(
        environment.run(
            "python",
            "-c",
            "import importlib.metadata, json, vaeserve, vaeserve_server, vaeserve_training\n"
            "files = [m.__file__ for m in (vaeserve, vaeserve_server, vaeserve_training)]\n"
            "print(json.dumps([files, vaeserve.__version__, importlib.metadata.version('vaeserve')]))",
        )
    )
    files, version, metadata_version = found
    assert all(Path(file).is_relative_to(environment.folder) for file in files), files
    assert version == metadata_version == __version__


@pytest.mark.parametrize("command", ["vaeserve", "vaeserve-server", "vaeserve-train"])
def test_commands_run(environment: Environment, command: str) -> None:
    assert environment.run(command, "--help").startswith("usage:")


def test_a_released_server_answers_a_released_client(environment: Environment, models_dir: Path) -> None:
    """Start, health, encode, decode, SIGTERM."""
    command = environment.command("vaeserve-server", "--models", str(models_dir), "--device", "cpu", "--port", "0")
    command += ["--metrics-port", "0"]
    with subprocess.Popen(
        command, cwd=environment.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            ready = server.stdout.readline().split()
            assert ready[:2] == ["serving", "mnist/1"], ready
            target = ready[3]
            assert environment.run("vaeserve", "health", "--target", target) == f"{target} is serving\n"
            environment.run("python", "-c", SESSION, target)
        finally:
            server.terminate()
    assert server.returncode == 0


@pytest.mark.parametrize("environment", ["wheel"], indirect=True)
def test_a_user_gets_types(environment: Environment, tmp_path: Path) -> None:
    """mypy takes the annotations of an installed package only where it says py.typed; else the type would be Any."""
    (tmp_path / "user.py").write_text("from vaeserve import Client\nreveal_type(Client('host:1').encode)\n")
    python = str(environment.folder / "bin" / "python")
    options = ["--config-file=", "--cache-dir=cache", "--follow-imports=silent", f"--python-executable={python}"]
    done = _run([sys.executable, "-m", "mypy", *options, "user.py"], cwd=tmp_path)
    assert "-> vaeserve._results.Encoding" in done, done
