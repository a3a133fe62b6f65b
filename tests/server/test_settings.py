"""Flags, variables and their errors; cores; log lines."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from vaeserve_server import logs
from vaeserve_server.cores import available_cores, cgroup_quota
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings, from_command_line, is_loopback


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("VAESERVE_"):
            monkeypatch.delenv(name)


def test_the_defaults_are_the_documented_ones() -> None:
    settings = from_command_line([])
    assert (settings.models, settings.device) == (Path("models"), "auto")
    assert (settings.host, settings.port, settings.insecure) == ("127.0.0.1", 50051, False)


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAESERVE_PORT", "7001")
    monkeypatch.setenv("VAESERVE_MAX_QUEUE_ROWS", "5")
    settings = from_command_line(["--port", "7002"])
    assert (settings.port, settings.max_queue_rows) == (7002, 5)


def test_every_flag_is_explained_and_every_explanation_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        from_command_line(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description
        assert field.description.endswith(".")


def test_pinned_versions_are_named_one_by_one() -> None:
    assert from_command_line(["--pin", "mnist/3,faces/1"]).pinned == {("mnist", "3"), ("faces", "1")}
    assert from_command_line([]).pinned == frozenset()
    with pytest.raises(StartError, match=r"--pin .* is 'mnist/3,faces': 'faces' is no version of a model; name each"):
        from_command_line(["--pin", "mnist/3,faces"])


@pytest.mark.parametrize(("given_us", "waits_s"), [(0, 0.0), (100, 0.001), (1000, 0.001), (2500, 0.003)])
def test_a_wait_is_never_shorter_than_asked_for(given_us: int, waits_s: float) -> None:
    assert Settings(batch_wait_us=given_us).batch_wait_s == waits_s


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_an_unknown_flag_ends_as_argparse_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        from_command_line(["--colour", "red"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "gpu"], "--device (or VAESERVE_DEVICE) is 'gpu': input should be 'auto', 'cuda' or 'cpu'"),
        (["--max-batch-rows", "-1"], "--max-batch-rows (or VAESERVE_MAX_BATCH_ROWS) is '-1': input should be greater"),
        (["--drain-s", "inf"], "--drain-s (or VAESERVE_DRAIN_S) is 'inf': input should be a finite number"),
        (["--host", "example.org"], "host example.org can be reached from other machines"),
    ],
)
def test_wrong_values_are_named(flags: list[str], words: str) -> None:
    with pytest.raises(StartError, match=re.escape(words)):
        from_command_line(flags)


TLS = ["--tls-cert", "c.pem", "--tls-key", "k.pem"]
OPEN = "can be reached from other machines and nothing protects the server there; use 127.0.0.1, or --tls-cert and"
READABLE = "can be reached from other machines, and the tokens would cross the network unencrypted; add --tls-cert and"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], OPEN),
        (["--host", "::"], OPEN),
        (["--host", "0.0.0.0", "--no-open-health"], OPEN),
        (["--host", "0.0.0.0", "--tokens", "t.json"], READABLE),
        (["--tls-cert", "c.pem"], "--tls-cert goes with --tls-key; give both"),
        (["--tls-key", "k.pem"], "--tls-key goes with --tls-cert; give both"),
        (["--client-ca", "a.pem"], "--client-ca goes with --tls-cert and --tls-key"),
        (["--host", "0.0.0.0", "--insecure"], ""),
        (["--host", "0.0.0.0", *TLS], ""),
        (["--host", "0.0.0.0", *TLS, "--client-ca", "a.pem"], ""),
        (["--host", "0.0.0.0", *TLS, "--tokens", "t.json"], ""),
        (["--host", "0.0.0.0", "--tokens", "t.json", "--insecure"], ""),
        (["--tokens", "t.json"], ""),
        (TLS, ""),
    ],
)
def test_an_address_that_others_reach_wants_tls_or_a_word(flags: list[str], words: str) -> None:
    if not words:
        from_command_line(flags)
        return
    with pytest.raises(StartError, match=re.escape(words)) as raised:
        from_command_line(flags)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.3.4.5", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_only_this_machine_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, float("inf")),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "50000 100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n0::/pod/box\n",  # hybrid, with processor time left to version 2
                "sys/fs/cgroup/unified/pod/box/cpu.max": "max 100000\n",
                "sys/fs/cgroup/unified/pod/cpu.max": "250000 100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n2:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/docker/1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",  # in a container the mount is the cgroup
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            float("inf"),
        ),
    ],
)
def test_the_cgroups_quota_is_found(files: dict[str, str], cores: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("150000", 1), ("200000", 2), ("399999", 3), ("max", 4)])
def test_part_of_a_core_is_none_to_use(quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{quota} 100000\n")
    assert available_cores(tmp_path) == cores


def test_a_log_line_reads_well_and_cuts_well() -> None:
    record = logging.makeLogRecord(
        {"msg": "model loaded", "levelname": "INFO", "created": 0.5, "msecs": 500.0, "name": "vaeserve_server"}
    )
    record.fields = {"model": "mnist/1", "reason": 'two "words"', "empty": ""}
    assert logs.TextFormatter().format(record) == (
        r'1970-01-01T00:00:00.500Z INFO model loaded model=mnist/1 reason="two \"words\"" empty=""'
    )
    assert json.loads(logs.JsonFormatter().format(record)) == {
        "time": "1970-01-01T00:00:00.500Z",
        "level": "info",
        "logger": "vaeserve_server",
        "message": "model loaded",
        "model": "mnist/1",
        "reason": 'two "words"',
        "empty": "",
    }
