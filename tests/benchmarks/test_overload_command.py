"""The overload proof proves something: calls are refused and say when to come again, and a missed bound is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import serving
from bundles import write_bundle

OVERLOAD = Path(__file__).with_name("overload.py")
# What is promised of a machine that has nothing else to do is not asked of one that runs tests.
PATIENT = ["--p99-ratio", "1000", "--refused-ms", "60000", "--memory-ratio", "1.5", "--recovered", "0.1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_bundle(folder, image_shape=(1, 16, 16), latent_shape=(64,))
    return folder


def overload(models: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Let five times as many calls come as a server can answer that takes four at a time."""
    command = [sys.executable, str(OVERLOAD), "--models", str(models), "--transport", serving.default_transport]
    command += ["--seconds", "2", "--times", "5", "--rows", "16", "--queue-rows", "64", "--max-calls", "4", *PATIENT]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=90, check=False)


def test_what_is_too_much_is_refused_with_push_back_and_the_rest_is_answered(models: Path) -> None:
    done = overload(models)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.partition("  ")[0]: line for line in done.stdout.splitlines()}
    assert "NOT MET" not in done.stdout
    assert lines["refused otherwise, of a sample"].split()[-3:] == ["none", "none", "met"]
    assert " 0 calls/s" not in lines["accepted"]


def test_a_missed_bound_is_told_by_the_exit_status(models: Path) -> None:
    done = overload(models, "--refused-ms", "0", "--seconds", "0.5")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "NOT MET" in line)
    assert line.startswith("refused, time")
