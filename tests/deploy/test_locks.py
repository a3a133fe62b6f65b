"""The files of hashes say what constraints.txt and pyproject.toml say, and every package in them has its hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {
    "server/requirements-server-cpu.txt": ["server-cpu"],
    "server/requirements-server-cuda.txt": ["server", "cuda"],
    "server/requirements-build.txt": [],
    "training/requirements.txt": ["cli", "server", "training"],
    ".ci/requirements.txt": ["dev"],
}
UNHASHED = {"torch"}  # whose build is the machine's choice


def pins(path: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / path).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def wanted(extras: list[str]) -> set[str]:
    """Return the names that the extras ask for, on any platform."""
    optional = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *(each for extra in extras for each in optional[extra])]
    parsed = [Requirement(each) for each in requirements]
    names = {canonicalize_name(each.name) for each in parsed if each.name != PROJECT["name"]}
    own = [extra for each in parsed if each.name == PROJECT["name"] for extra in each.extras]
    return names | wanted(own) if own else names


@pytest.mark.parametrize("path", LOCKS)
def test_every_package_has_its_hashes_and_names_no_place(path: str) -> None:
    text = (ROOT / path).read_text()
    entries = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pins(path)) > 0
    for entry in entries:
        head, *hashes = entry.strip().split("\\\n")
        assert hashes, head
        assert all(re.fullmatch(r"\s+--hash=sha256:[0-9a-f]{64}\s?", each) for each in hashes), head
    assert "://" not in text


@pytest.mark.parametrize("path", LOCKS)
def test_versions_are_those_of_the_constraints(path: str) -> None:
    constrained = pins("constraints.txt")
    # CUDA's own libraries are pinned here alone: ONNX Runtime says which it wants.
    ours = {name: version for name, version in pins(path).items() if not name.startswith("nvidia-")}
    assert ours == {name: constrained.get(name) for name in ours}


@pytest.mark.parametrize(("path", "extras"), LOCKS.items())
def test_everything_that_is_asked_for_is_there(path: str, extras: list[str]) -> None:
    assert wanted(extras) - pins(path).keys() - UNHASHED == (set() if extras else wanted([]))
    assert not UNHASHED & pins(path).keys()


def test_images_and_make_take_them() -> None:
    for file in ("Makefile", "server/Dockerfile", "training/Dockerfile"):
        text = (ROOT / file).read_text()
        assert "--require-hashes" in text
        for name in re.findall(r"[\w./]*requirements[\w-]*\.txt", text):
            assert list(ROOT.glob(name)) or list(ROOT.glob(f"*/{name}")), f"{file} names {name}"
