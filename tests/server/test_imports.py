"""What the server may import: no torch, one file with ONNX Runtime, and of the SDK the contract and the codec alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vaeserve_server

PACKAGE = Path(vaeserve_server.__file__).parent
MODULES = {file.stem: file for file in PACKAGE.glob("*.py")}
# The order of the design's arrows: a module imports only modules of its own or an earlier layer.
TRANSPORTS = {"transport_grpc", "calls", "status", "health", "app", "__main__"}


def imports(file: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it; `from a import b` as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def loaded_after(statement: str) -> set[str]:
    """Return the modules in a fresh process after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(finished.stdout.split())


def test_the_server_imports_neither_torch_nor_onnx_nor_training_nor_the_client() -> None:
    loaded = loaded_after("import vaeserve_server.app")
    assert "onnxruntime" in loaded
    forbidden = {"torch", "onnx", "vaeserve_training", "vaeserve.client", "vaeserve.aio", "PIL", "matplotlib"}
    assert not loaded & forbidden


def test_the_entry_imports_only_the_standard_library() -> None:
    loaded = loaded_after("import vaeserve_server.__main__")
    assert not loaded & {"grpc", "numpy", "pydantic", "onnxruntime", "google.protobuf", "vaeserve"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_graphs_imports_onnx_runtime(module: str) -> None:
    names = imports(MODULES[module])
    assert any(name.partition(".")[0] == "onnxruntime" for name in names) == (module == "graphs")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_of_the_sdk_only_the_contract_and_the_codec_are_used(module: str) -> None:
    used = {name for name in imports(MODULES[module]) if name.partition(".")[0] == "vaeserve"}
    assert {".".join(name.split(".")[:2]) for name in used} <= {"vaeserve", "vaeserve.v1", "vaeserve.tensors"}


@pytest.mark.parametrize(
    "module", ["service", "repository", "engine", "batcher", "work", "executor", "bundle", "errors"]
)
def test_service_and_below_know_no_transport(module: str) -> None:
    names = imports(MODULES[module])
    assert not {name for name in names if name.partition(".")[0] in {"grpc", "grpc_health", "grpc_reflection"}}
    assert not {name for name in names if name.removeprefix("vaeserve_server.") in TRANSPORTS}
    assert "google.rpc" not in names


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_metrics_and_tracing_know_who_watches(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert ("prometheus_client" in roots) == (module in {"metrics", "metrics_merge"})
    assert ("opentelemetry" in roots) == (module == "tracing")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_face_of_other_servers_imports_their_client(module: str) -> None:
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert module.startswith("oip") or "tritonclient" not in roots


def test_no_module_imports_itself_in_a_circle() -> None:
    arrows = {
        module: {name.split(".")[1] for name in imports(file) if name.startswith("vaeserve_server.")} & MODULES.keys()
        for module, file in MODULES.items()
    }
    settled: set[str] = set()
    while layer := {module for module, needed in arrows.items() if module not in settled and needed <= settled}:
        settled |= layer
    assert settled == MODULES.keys()
