"""The overload proof proves something: calls are refused and say when to come again, and a missed bound is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import overload
import serving
from bundles import write_bundle

# What is promised of a machine that has nothing else to do is not asked of one that runs tests.
PATIENT = ["--p99-ratio", "1000", "--refused-ms", "60000", "--memory-ratio", "1.5", "--recovered", "0.1"]


Told = Callable[[list[str]], tuple[int, str]]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Let five times as many calls come as a server can answer that takes four at a time."""
    models = tmp_path_factory.mktemp("models")
    write_bundle(models, image_shape=(1, 16, 16), latent_shape=(64,))
    given = ["--models", str(models), "--transport", serving.default_transport, "--seconds", "1", "--times", "5"]
    return [*given, "--rows", "16", "--queue-rows", "64", "--max-calls", "4", *PATIENT]


@pytest.fixture(scope="module")
def seen(flags: list[str]) -> dict[str, Any]:
    """What the command sees of that load."""
    return overload.measure(overload.parse(flags))


@pytest.fixture
def told(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """What the command says of it, given its flags: its exit status and its table."""
    monkeypatch.setattr(overload, "measure", lambda _: seen)

    def run(given: list[str]) -> tuple[int, str]:
        status = overload.main(given)
        return status, capsys.readouterr().out

    return run


def test_what_is_too_much_is_refused_with_push_back_and_the_rest_is_answered(told: Told, flags: list[str]) -> None:
    status, table = told(flags)
    assert status == 0, table
    lines = {line.partition("  ")[0]: line for line in table.splitlines()}
    assert "NOT MET" not in table
    assert lines["refused otherwise, of a sample"].split()[-3:] == ["none", "none", "met"]
    assert " 0 calls/s" not in lines["accepted"]


def test_a_missed_bound_is_told_by_the_exit_status(told: Told, flags: list[str]) -> None:
    status, table = told([*flags, "--refused-ms", "0"])
    assert status == 1, table
    (line,) = (line for line in table.splitlines() if "NOT MET" in line)
    assert line.startswith("refused, time")


def test_as_a_command_it_says_in_one_line_what_keeps_it(tmp_path: Path) -> None:
    command = [sys.executable, overload.__file__, "--models", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("overload: ")
    assert done.stderr.count("\n") == 1
