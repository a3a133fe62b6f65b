"""The generated code is what the proto says today, and one ONNX Runtime is installed."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "client" / "vaeserve" / "v1"


def test_generated_code_is_what_the_proto_says(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, "vaeserve/v1/vae.proto"],
        check=True,
        timeout=60,
    )
    made = {path.name: path.read_text() for path in (tmp_path / "vaeserve" / "v1").iterdir()}
    committed = {path.name: path.read_text() for path in GENERATED.iterdir() if path.name in made}
    assert committed == made, "run `make protos` and commit what it writes"
    assert sorted(made) == ["vae_pb2.py", "vae_pb2.pyi", "vae_pb2_grpc.py"]


@pytest.mark.parametrize("folder", ["client", "server", "training"])
def test_no_folder_of_the_layout_is_itself_a_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_exactly_one_onnxruntime_is_installed() -> None:
    names = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    found = sorted(name for name in names if name and name.lower().replace("_", "-").startswith("onnxruntime"))
    assert len(found) == 1, f"{found} all ship the module onnxruntime; keep one"
