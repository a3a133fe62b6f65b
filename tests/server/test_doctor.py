"""`vaeserve-server doctor`: what it finds here, what it makes of other machines, and its exit status."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bundles import write_bundle
from certificates import Authority
from test_lifecycle import ENVIRONMENT
from vaeserve_server import doctor, gpu_facts, graphs, logs, tokens

COMMAND = [sys.executable, "-m", "vaeserve_server", "doctor"]
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
SCREEN_LINES, SCREEN_COLUMNS = 50, 120


@pytest.fixture(autouse=True)
def _logs_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets up the log of its process, which here is every test's."""
    monkeypatch.setattr(logs, "configure", lambda *_: None)


def examined(folder: Path, *flags: str) -> tuple[int, str]:
    """Run the command in `folder`; return its exit status and the screen."""
    environment = ENVIRONMENT | WITHOUT_GPU
    done = subprocess.run(
        [*COMMAND, *flags], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) <= SCREEN_LINES
    assert [line for line in lines[1:6] if len(line) > SCREEN_COLUMNS] == []
    return done.returncode, done.stdout


def test_without_a_model_it_says_how_to_get_one(tmp_path: Path) -> None:
    status, screen = examined(tmp_path)
    assert status == 0
    assert re.search(r"^  vaeserve \S+, Python 3\.\d+", screen, re.MULTILINE)
    assert re.search(r"^  onnxruntime\S* \d", screen, re.MULTILINE)
    assert "prometheus-client" in screen
    assert "  CPUExecutionProvider: works\n" in screen
    assert re.search(r"  CUDAExecutionProvider: (does not work: |not built into)", screen)
    assert "Models\n  none in models\n" in screen
    assert "Next\n  - models folder models does not exist; train one with `vaeserve-train fit`" in screen
    assert "Broken" not in screen


def test_a_sound_model_is_timed_at_several_batch_sizes(models_dir: Path, tmp_path: Path) -> None:
    status, screen = examined(tmp_path, "--models", str(models_dir), "--device", "cpu", "--threads", "1")
    assert status == 0
    assert re.search(r"^  mnist/1: sound, digest [0-9a-f]{12}$", screen, re.MULTILINE)
    assert "Time of mnist/1 on CPUExecutionProvider, 1 run(s) at once" in screen
    rows = re.findall(r"^ +(\d+) +([\d.]+) ms +(\d+) +([\d.]+) ms +(\d+)$", screen, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 8, 64, 512]
    for count, encode_ms, encoded, decode_ms, decoded in rows:
        for took_ms, rate in ((encode_ms, encoded), (decode_ms, decoded)):
            assert float(took_ms) > 0
            assert int(rate) == pytest.approx(1000 * int(count) / float(took_ms), rel=0.02)
    assert screen.endswith(f"Next\n  - vaeserve-server --models {models_dir} --device cpu --threads 1\n")


def test_a_damaged_model_is_broken(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "models")
    (folder / "decoder.onnx").write_bytes(b"something else")
    status, screen = examined(tmp_path)
    assert status == 1
    assert re.search(r"Broken\n  - models/mnist/1/decoder\.onnx: its SHA-256 is ", screen)


def test_certificates_and_tokens_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue()
    _, token = tokens.make("reader", ("*",), None)
    (tmp_path / "tokens.json").write_text(tokens.TokenFile(tokens=(token,)).model_dump_json(exclude_none=True))
    flags = ["--models", str(tmp_path / "none"), "--device", "cpu", "--tls-cert", str(certificate)]
    assert doctor.main([*flags, "--tls-key", str(key), "--tokens", str(tmp_path / "tokens.json")]) == 0
    screen = capsys.readouterr().out
    assert f"{certificate}: goes with its key, expires " in screen
    assert "tokens.json: reader\n" in screen
    _, other_key = authority.issue("other")
    assert doctor.main([*flags, "--tls-key", str(other_key)]) == 1
    assert f"--tls-key {other_key}: it is not the key of the first certificate" in capsys.readouterr().out


def test_a_gpu_that_was_asked_for_and_is_not_there_is_broken(tmp_path: Path) -> None:
    status, screen = examined(tmp_path, "--device", "cuda")
    assert status == 1
    assert "Broken\n  - device cuda cannot be used: " in screen


def test_a_wrong_flag_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--port", "ninety"]) == 2
    assert capsys.readouterr().err.startswith("vaeserve-server doctor: --port (or VAESERVE_PORT) is 'ninety'")


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: vaeserve-server doctor")


def with_packages(monkeypatch: pytest.MonkeyPatch, installed: Callable[[str], str]) -> None:
    monkeypatch.setattr(doctor, "_version", installed)


def test_what_is_missing_is_named_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_packages(monkeypatch, lambda name: "" if name.startswith(("pydantic", "onnxruntime")) else "1.0")
    assert doctor.main([]) == 1
    screen = capsys.readouterr().out
    assert "Broken\n  - missing: pydantic, pydantic-settings, onnxruntime\n" in screen
    assert 'Next\n  - pip install "vaeserve[server]"' in screen


def test_two_onnx_runtimes_are_one_too_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with_packages(monkeypatch, lambda name: "1.0")
    assert doctor.main(["--models", str(tmp_path), "--device", "cpu"]) == 1
    screen = capsys.readouterr().out
    assert "onnxruntime 1.0 and onnxruntime-gpu 1.0 overwrite each other" in screen
    assert "pip uninstall onnxruntime onnxruntime-gpu" in screen


class Driver:
    """An NVIDIA driver's library as ctypes shows it: it runs CUDA `version` and has these GPUs, or fails to begin."""

    def __init__(self, version: int = 13000, gpus: tuple[str, ...] = ("NVIDIA H100",), failure: int = 0) -> None:
        self._version, self._gpus, self._failure = version, gpus, failure

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._failure

    def cuDriverGetVersion(self, version: Any) -> None:  # noqa: N802
        version._obj.value = self._version

    def cuDeviceGetCount(self, count: Any) -> None:  # noqa: N802
        count._obj.value = len(self._gpus)

    def cuDeviceGet(self, device: Any, index: int) -> None:  # noqa: N802
        device._obj.value = index

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> None:  # noqa: N802
        name.value = self._gpus[device.value].encode()[: size - 1]

    def cuDeviceTotalMem_v2(self, memory_bytes: Any, device: ctypes.c_int) -> None:  # noqa: N802
        memory_bytes._obj.value = 80 * 2**30


def gpu_machine(monkeypatch: pytest.MonkeyPatch, driver: Driver, build: graphs.Build, problem: str) -> None:
    monkeypatch.setattr(gpu_facts.pinned, "driver", lambda: driver)
    monkeypatch.setattr(graphs, "installed", lambda: build)
    monkeypatch.setattr(graphs, "problem_of", lambda provider: problem if provider == graphs.CUDA else "")


CUDA_BUILD = graphs.Build("13.0", [graphs.CUDA, graphs.CPU])
ADVICE = [
    (Driver(12040), CUDA_BUILD, "no", "update its driver to one for CUDA 13.0"),
    (Driver(13000), CUDA_BUILD, "libcudnn.so.9 is missing", 'pip install "vaeserve[server,cuda]", which brings'),
    (Driver(13000), graphs.Build("", [graphs.CPU]), "", "pip uninstall onnxruntime, then pip install"),
]


@pytest.mark.parametrize(("driver", "build", "problem", "advice"), ADVICE)
def test_on_a_gpu_machine_it_says_what_keeps_the_gpu_from_use(  # noqa: PLR0917
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    driver: Driver,
    build: graphs.Build,
    problem: str,
    advice: str,
) -> None:
    gpu_machine(monkeypatch, driver, build, problem)
    assert doctor.main(["--models", str(tmp_path), "--device", "cpu"]) == 0
    screen = capsys.readouterr().out
    assert re.search(r"NVIDIA driver: runs CUDA up to 1[23]\.[04]; NVIDIA H100, 80 GiB\n", screen)
    assert f"to use the GPU: {advice}" in " ".join(screen.split())
    assert ("libcudnn.so.9: " in screen) == bool(build.cuda_version)


def test_a_gpu_that_works_needs_no_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpu_machine(monkeypatch, Driver(), CUDA_BUILD, "")
    assert doctor.main(["--models", str(tmp_path), "--device", "cpu"]) == 0
    screen = capsys.readouterr().out
    assert "CUDAExecutionProvider: works\n" in screen
    assert "to use the GPU" not in screen


def test_a_driver_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts.pinned, "driver", lambda: Driver(failure=100))
    assert gpu_facts.driver() == "installed, but it gives no GPU (cuInit returns 100)"


def test_libraries_tell_their_versions_or_why_they_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def cudnn_version() -> int:
        return 91301

    def load(name: str) -> object:
        if "cublas" in name:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(cudnnGetVersion=cudnn_version, cudaRuntimeGetVersion=_cuda_13_1)

    monkeypatch.setattr(gpu_facts.ctypes, "CDLL", load)
    found = {library.name: library.version or library.problem for library in gpu_facts.libraries("13.0")}
    assert found == {
        "libcudart.so.13": "13.1",
        "libcublasLt.so.13": "libcublasLt.so.13: cannot open shared object file",
        "libcublas.so.13": "libcublas.so.13: cannot open shared object file",
        "libcudnn.so.9": "9.13.1",
    }


def _cuda_13_1(version: Any) -> None:
    version._obj.value = 13010
