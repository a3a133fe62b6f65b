"""The soak, for seconds; and that each of its checks can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serving
from soak_clients import book, judge
from soak_models import SMALL, Direct, Publisher
from soak_watch import Figures, Sample, growth
from soak_wishes import Books, Ledger, Wish, Wishes
from vaeserve import ModelRef, errors
from vaeserve._results import Encoding

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_seconds_of_everything_at_once(bundle_dir: Path) -> None:
    command = [sys.executable, str(SOAK), "--minutes", "0.1", "--transport", serving.default_transport]
    done = subprocess.run([*command, "--bundle", str(bundle_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\npassed\n")
    for kind in ("blocking", "asyncio"):
        for verb in ("encode", "decode", "sample"):
            row = re.search(rf"^{kind} {verb} +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +0 +0$", done.stdout, re.MULTILINE)
            assert row is not None, done.stdout
            issued, *ended = map(int, row.groups())
            assert issued == sum(ended)


def outcome(act: Callable[[Ledger, Books, Wish], None], check: Callable[[Any], None] = lambda answer: None) -> Books:
    """Return the books of one call."""
    ledger = Ledger()
    books = ledger.open("encode")
    act(ledger, books, Wish("encode", (), {}, check))
    assert books.balance() == 0
    assert bool(ledger.problems) == bool(books.failed or books.wrong)
    return books


def test_only_what_was_meant_to_fail_may() -> None:
    late, full, broken = (
        kind("words") for kind in (errors.DeadlineExceeded, errors.ResourceExhausted, errors.Internal)
    )
    missing = errors.NotFound("words")
    assert outcome(lambda *call: book(*call, late, short=True, bad=False)).expired == 1
    assert outcome(lambda *call: book(*call, late, short=False, bad=False)).failed == 1
    assert outcome(lambda *call: book(*call, full, short=False, bad=False)).refused == 1
    assert outcome(lambda *call: book(*call, missing, short=False, bad=True)).refused == 1
    assert outcome(lambda *call: book(*call, missing, short=False, bad=False)).failed == 1
    assert outcome(lambda *call: book(*call, broken, short=True, bad=True)).failed == 1
    assert Books(issued=3, answered=1, expired=1).balance() == 1


def test_an_answer_of_another_version_or_another_call_is_wrong(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "models", tmp_path / "archive", None)
    publisher.next()
    direct = Direct(tmp_path / "archive")
    wishes = Wishes(direct, [SMALL], 1)
    wish = next(wish for wish in iter(wishes.next, None) if wish.verb == "encode" and "seed" not in wish.options)
    answers = {version: direct.encode(ModelRef(SMALL, version, ""), wish.arguments[0]) for version in "12"}

    def answer(of: str, said: str, row: int = 0) -> Encoding:
        mean, stddev = (np.roll(array, row, axis=0) for array in answers[of])
        return Encoding(model=ModelRef(SMALL, said, ""), mean=mean, stddev=stddev)

    assert outcome(lambda *call: judge(*call, answer("2", "2")), wish.check).answered == 1
    assert outcome(lambda *call: judge(*call, answer("1", "2")), wish.check).wrong == 1
    if len(answers["1"][0]) > 1:
        assert outcome(lambda *call: judge(*call, answer("2", "2", row=1)), wish.check).wrong == 1


def test_damaged_versions_are_published_too_and_none_of_them_is_kept(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "models", tmp_path / "archive", None)
    lying = []
    for _ in range(30):
        publisher.next()
        lying.append({path.name for path in (tmp_path / "models" / SMALL).iterdir()})
    assert [any(len(name) == 9 for name in names) for names in lying].count(True) == 2
    assert all("1" in names and len(names) <= 5 for names in lying)
    assert len(list((tmp_path / "archive" / SMALL).iterdir())) == 29


@pytest.mark.parametrize(
    ("grows", "rest", "problem"),
    [
        (lambda second: Figures(100, 10, 5), Figures(100, 10, 5), []),
        (lambda second: Figures(100 + 2 * second, 10, 5), Figures(300, 10, 5), ["memory grew from 200 to 281 MB"]),
        (lambda second: Figures(min(180, 100 + 9 * second), 10, 5), Figures(180, 10, 5), []),  # warmed, then flat
        (lambda second: Figures(100, 10 + second, 5), Figures(100, 110, 5), ["110 descriptors at rest, 51 at most"]),
        (lambda second: Figures(100, 10, 5), Figures(100, 10, 9), ["9 threads at rest, 6 at most"]),
    ],
)
def test_what_grows_is_told(grows: Callable[[int], Figures], rest: Figures, problem: list[str]) -> None:
    told = growth([Sample(float(second), grows(second)) for second in range(101)], rest)
    assert [text.partition(" under load")[0] for text in told] == problem
