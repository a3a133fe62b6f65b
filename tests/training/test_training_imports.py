"""Training meets serving only at the bundle: it imports no server, no client but the contract, and no grpc."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vaeserve
import vaeserve_server
import vaeserve_training

PACKAGES = {module.__name__: Path(str(module.__file__)).parent for module in (vaeserve, vaeserve_server)}
FILES = sorted(Path(str(vaeserve_training.__file__)).parent.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it; `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_training_file_imports_of_the_sdk_only_the_contract(file: Path) -> None:
    roots = {"grpc", "grpc_health", "vaeserve_server"}
    assert [name for name in imports(file) if name.partition(".")[0] in roots] == []
    assert [name for name in imports(file) if name.startswith("vaeserve.") and not name.startswith("vaeserve.v1")] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_neither_server_nor_sdk_imports_training(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    found = {name for file in files for name in imports(file)}
    assert [name for name in found if name.partition(".")[0] in {"vaeserve_training", "torch", "onnx"}] == []


LOADED = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Watch())
import vaeserve_training.commands.export, vaeserve_training.commands.fit
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def loaded() -> tuple[str, set[str]]:
    """What the telemetry's variable is when ONNX Runtime is imported, and the modules that training and export load."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    telemetry, modules = done.stdout.splitlines()
    return telemetry, set(modules.split())


def test_training_loads_no_tensorboard_unless_it_is_asked_for(loaded: tuple[str, set[str]]) -> None:
    _, modules = loaded
    assert "vaeserve_training.board" in modules
    assert "tensorboard" not in modules


def test_training_and_exporting_load_no_grpc(loaded: tuple[str, set[str]]) -> None:
    _, modules = loaded
    assert {"vaeserve_training.export", "vaeserve.v1.vae_pb2"} <= modules
    assert not {"grpc", "vaeserve_server"} & modules


def test_onnx_runtime_is_imported_with_its_telemetry_off(loaded: tuple[str, set[str]]) -> None:
    telemetry, modules = loaded
    assert "onnxruntime" in modules
    assert telemetry == "1"
