"""Everything at once, for minutes: is every accepted answer right, does every counter add up, does nothing grow?

    make soak ARGS="--minutes 3"
    make soak ARGS="--minutes 3 --transport envoy"

Both clients of the SDK, each in a process of its own, ask for Encode, Decode and Sample with random sizes; some calls
are cancelled, some have hardly any time, some are nonsense. Meanwhile new versions are published, some of them damaged,
the server is told to reload, and a worker is killed now and then. Prints a table; exits with 1 if any check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
HELPERS = [str(HERE), str(HERE.parent), str(HERE.parent / "server")]
sys.path[:0] = HELPERS

from metrics_page import Page  # noqa: E402
from soak_models import DIGITS, SMALL, Publisher  # noqa: E402
from soak_server import SoakServer  # noqa: E402
from soak_watch import growth  # noqa: E402
from soak_wishes import Books  # noqa: E402

KINDS = ("blocking", "asyncio")
VERBS = ("encode", "decode", "sample")
_VERSIONS = 220
_WATCH_S = 0.1  # and a version is taken when two looks have seen it
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.3, 5.0
_HANG_UPS, _KILLS_PER_MINUTE = 10, 2
_FAULTS = ("UNKNOWN", "INTERNAL", "DATA_LOSS", "UNIMPLEMENTED")


def main(arguments: Sequence[str]) -> int:
    """Soak a server; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--transport", choices=["grpc", "envoy"], default="grpc")
    parser.add_argument("--workers", type=int, help="default 2, of which one is killed now and then; 1 behind Envoy")
    parser.add_argument("--bundle", type=Path, help="a trained model to serve as well; default models/mnist/1 if there")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    workers = options.workers or (1 if options.transport == "envoy" else 2)
    bundle = options.bundle or (Path("models/mnist/1") if Path("models/mnist/1/model.json").is_file() else None)
    chosen = Options(options.transport, workers, bundle, 60 * options.minutes, options.seed)
    with tempfile.TemporaryDirectory(prefix="vaeserve-soak-") as folder:
        soak = Soak(Path(folder), chosen)
        soak.run()
    print(soak.table())
    for problem in soak.problems:
        print(f"FAILED  {problem}")
    print("FAILED" if soak.problems else "passed")
    return 1 if soak.problems else 0


class Options(NamedTuple):
    """What is soaked, and for how long. `bundle` is a trained model, if there is one."""

    transport: str
    workers: int
    bundle: Path | None
    seconds: float
    seed: int = 1


class Soak:
    """One soak of one server. `problems` says in words which checks failed."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.problems: list[str] = []
        self._folder = folder
        self._options = options
        self._names = [SMALL, *([DIGITS] if options.bundle else [])]
        self._publisher = Publisher(folder / "models", folder / "archive", options.bundle)
        self._server = SoakServer(
            folder / "models",
            folder / "server.log",
            transport=options.transport,
            workers=options.workers,
            watch_s=_WATCH_S,
        )
        self._clients: dict[str, Any] = {}
        self._rows: list[Sequence[object]] = []

    def run(self) -> None:
        """Load, trouble, rest, and look."""
        try:
            tasks_before = self._server.rest()("vaeserve_event_loop_tasks")
            children = {kind: self._start(kind, place) for place, kind in enumerate(KINDS)}
            try:
                self._trouble(time.monotonic() + self._options.seconds)
                self._clients = {kind: json.loads(child.communicate()[0]) for kind, child in children.items()}
            finally:
                for child in children.values():
                    child.kill()
            page = self._server.rest()
            self._check_clients()
            self._check_server(page, tasks_before)
        finally:
            status = self._server.stop()
        self._check_log(status)

    def table(self) -> str:
        """Return what happened."""
        _, workers, _, seconds, _ = self._options
        models = ", ".join(self._names)
        lines = [f"{seconds:.0f} s over {self._options.transport}, {workers} worker(s), models {models}", ""]
        columns = list(vars(Books()))
        lines.append(f"{'calls':<22}" + "".join(f"{column:>11}" for column in columns))
        for kind, client in self._clients.items():
            for verb, books in sorted(client["books"].items()):
                lines.append(f"{f'{kind} {verb}':<22}" + "".join(f"{books[column]:>11}" for column in columns))
        lines.append("")
        lines += [f"{row[0]!s:<34}" + "".join(f"{value!s:>14}" for value in row[1:]) for row in self._rows]
        return "\n".join(lines)

    def _start(self, kind: str, place: int) -> subprocess.Popen[str]:
        plan = {
            "target": self._server.target,
            "archive": str(self._folder / "archive"),
            "names": self._names,
            "seconds": self._options.seconds,
            "seed": self._options.seed * 100 + place * 50,
        }
        command = [sys.executable, str(HERE / "soak_clients.py"), kind, json.dumps(plan)]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(HELPERS)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)

    def _trouble(self, until: float) -> None:
        """Publish, hang up and kill until the time is over."""
        seconds = self._options.seconds
        kills = self._moments(until, max(1, round(_KILLS_PER_MINUTE * seconds / 60)) if self._is_killed() else 0)
        hang_ups = self._moments(until, _HANG_UPS)
        next_kill, next_hang_up = next(kills, until), next(hang_ups, until)
        while (now := time.monotonic()) < until:
            self._publisher.next()
            if now >= next_hang_up:
                self._server.hang_up()
                next_hang_up = next(hang_ups, until)
            if now >= next_kill:
                self._server.kill_one()
                next_kill = next(kills, until)
            pause_s = (until - time.monotonic()) / max(1, _VERSIONS - self._publisher.published)
            time.sleep(min(max(pause_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))

    def _moments(self, until: float, count: int) -> Iterator[float]:
        """Yield times that cut what is left in equal parts."""
        began = time.monotonic()
        yield from (began + (until - began) * (place + 1) / (count + 1) for place in range(count))

    def _is_killed(self) -> bool:
        return self._options.workers > 1

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    def _check_clients(self) -> None:
        for kind, client in self._clients.items():
            books = {verb: Books(**counts) for verb, counts in client["books"].items()}
            for verb, book in books.items():
                self._expect(book.balance() == 0, f"{kind} {verb}: {book.balance()} calls were lost sight of")
                self._expect(book.failed == 0, f"{kind} {verb}: {book.failed} calls failed")
                self._expect(book.wrong == 0, f"{kind} {verb}: {book.wrong} answers are wrong")
            for verb in VERBS:
                self._expect(verb in books and books[verb].answered > 0, f"{kind} {verb}: nothing was answered")
            for column in ("cancelled", "expired", "refused"):
                count = sum(getattr(book, column) for book in books.values())
                self._expect(count > 0, f"{kind}: no call was {column}, so this was not tried")
            self.problems += [f"{kind}: {problem}" for problem in client["problems"]]
            self._rows.append((f"{kind} client, MB", f"{client['figures']['memory_mb']:.0f}"))
            self._expect(client.get("tasks", 0) == 0, f"{kind}: {client.get('tasks')} tasks are left")

    def _check_server(self, page: Page, tasks_before: float) -> None:
        started, ended = page("vaeserve_calls_started_total"), page("vaeserve_calls_total")
        codes = page.by("code", "vaeserve_calls_total")
        self._rows.append(("server: calls accepted", f"{started:.0f}"))
        self._rows += [(f"server: {code}", f"{count:.0f}") for code, count in sorted(codes.items()) if count]
        self._expect(started == ended, f"the server took in {started:.0f} calls and ended {ended:.0f}")
        for code in _FAULTS:
            self._expect(not codes.get(code), f"the server ended {codes.get(code)} calls with {code}")
        tasks = page("vaeserve_event_loop_tasks")
        self._rows.append(("server: tasks before, after", f"{tasks_before:.0f}", f"{tasks:.0f}"))
        self._expect(tasks <= tasks_before, f"{tasks - tasks_before:.0f} tasks are left")
        reloads = page.by("result", "vaeserve_reloads_total")
        self._rows.append(("reloads: ok, failed", *(f"{reloads[result]:.0f}" for result in ("ok", "failed"))))
        self._expect(reloads["ok"] > 0, "nothing was reloaded")
        if not self._server.kills:
            self._check_books_of_both(codes, page)
        self._check_growth()

    def _check_books_of_both(self, codes: Mapping[str, float], page: Page) -> None:
        """Hold the server's books against the clients': what they saw answered, it answered, and nothing else."""
        totals = Books()
        for client in self._clients.values():
            for counts in client["books"].values():
                for column, count in counts.items():
                    setattr(totals, column, getattr(totals, column) + count)
        answered = sum(page("vaeserve_calls_total", code="OK", rpc=verb.title()) for verb in VERBS)
        # A call that was cancelled or expired may have been answered in the same moment. Coalesced calls are fewer.
        most = totals.answered + totals.cancelled + totals.expired
        self._rows.append(("answered: clients, server", totals.answered, f"{answered:.0f}"))
        self._expect(0 < answered <= most, f"the server answered {answered:.0f} calls, clients know of {most} at most")

    def _check_growth(self) -> None:
        rest = self._server.figures()
        for pid, samples in self._server.samples.items():
            if pid not in rest:
                continue
            first, last = samples[len(samples) // 5].figures, samples[-1].figures
            life_s = samples[-1].time_s - samples[0].time_s
            self._rows.append((f"process {pid}, {life_s:.0f} s: MB", f"{first.memory_mb:.0f}", f"{last.memory_mb:.0f}"))
            for name in ("descriptors", "threads"):
                values = [getattr(figures, name) for figures in (first, last, rest[pid])]
                self._rows.append((f"    {name}: early, late, at rest", *values))
            tenths = [samples[(len(samples) - 1) * tenth // 10].figures.memory_mb for tenth in range(11)]
            self._rows.append(("    MB over time", " ".join(f"{memory_mb:.0f}" for memory_mb in tenths)))
            self.problems += [f"process {pid}: {problem}" for problem in growth(samples, rest[pid])]
        self._rows.append(("versions published", self._publisher.published))
        self._rows.append(("workers killed", self._server.kills))
        self._expect(self._server.kills > 0 or not self._is_killed(), "no worker was killed")

    def _check_log(self, status: int) -> None:
        log = self._server.log()
        self._expect(status == 0, f"the server's exit status is {status}")
        self._expect("Traceback" not in log, f"the server's log has a traceback:\n{log[-3000:]}")
        strange = [line for line in log.splitlines() if " ERROR " in line]
        strange = [line for line in strange if "model refused" not in line and "a worker ended" not in line]
        self._expect(not strange, f"the server's log has errors: {strange[:5]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
