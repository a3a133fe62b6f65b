"""Benchmarks of serving: every figure is a ratio to what it is limited by, measured beside it in the same run.

    make bench                                     everything, under ten minutes: runs/bench/results.json
    make bench ARGS="--quick"                      one short round of everything, in about a minute
    make bench ARGS="--only encode-in-flight"      groups by name or pattern; --list names them

Servers, ONNX Runtime alone, the bare echo, the SDK and the load generator are processes of their own, and every round
measures what is compared one after the other. Nothing is asserted about times: a figure that misses its bound says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import catalogue
import h2load
import machine
from bed import Bed, Effort
from catalogue import Group
from children import BenchError
from table import Measured, Table, text
from traffic import find_model
from vaeserve_server.errors import DeviceError
from vaeserve_server.graphs import Runtime

_NOISY_SHARE = 0.05
_QUICK = Effort(seconds=0.15, rounds=1, stream_rows=20_000)
_FULL = Effort(seconds=0.6, rounds=3, stream_rows=1_000_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that were asked for; return 0, or 1 if they could not be run."""
    options = parse(arguments)
    groups = catalogue.groups(options.device)
    if options.list:
        print("\n".join(group.name for group in groups))
        return 0
    try:
        return run(options, catalogue.with_needs(groups, chosen(groups, options.only)))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of models (default: models)")
    parser.add_argument("--model", help="which of them, if there are several; its newest version is taken")
    parser.add_argument("--out", type=Path, help="where to write (default: runs/bench/results.json)")
    parser.add_argument("--quick", action="store_true", help="one short round: whether it works, not how fast it is")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GROUP", help="groups to run, e.g. 'encode-*'")
    parser.add_argument("--list", action="store_true", help="print the groups' names and end")
    parser.add_argument("--rounds", type=int, help=f"how often to measure everything (default: {_FULL.rounds})")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the graphs run")
    options = parser.parse_args(arguments)
    file = "results.json" if options.device == "cpu" else "results-gpu.json"
    options.out = options.out or Path("runs/bench") / file
    return options


def chosen(groups: Sequence[Group], patterns: Sequence[str]) -> list[Group]:
    """Return the groups that a pattern matches; BenchError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(group.name, pattern) for group in groups):
            names = ", ".join(group.name for group in groups)
            raise BenchError(f"no group is called {pattern}; there are {names}")
    return [group for group in groups if any(fnmatch.fnmatchcase(group.name, pattern) for pattern in patterns)]


def run(options: argparse.Namespace, groups: Sequence[Group]) -> int:
    """Measure the groups, print the table and write it."""
    if options.device == "cuda" and (problem := gpu_problem()):
        print(f"bench: there is no GPU to measure here: {problem}")
        return 0
    effort = _QUICK if options.quick else _FULL
    effort = effort if options.rounds is None else effort._replace(rounds=options.rounds)
    description = machine.describe()
    table = Table()
    began, watch = time.perf_counter(), machine.Watch()
    model = find_model(options.models, options.model)
    scratch = options.out.parent / "scratch"  # requests and logs; kept, for who wants to read the logs
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with Bed(model, options.models, scratch, options.device, effort) as bed:
        for which in range(effort.rounds):
            table.add_round(one_round(bed, groups, which, effort.rounds))
        others_share = watch.others_share()
    description |= {
        "model": f"{model.card.name}/{model.card.version}",
        "load_generator": "h2load" if h2load.find() else "http2_load.py, for h2load is not installed",
        "rounds": effort.rounds,
        "seconds_in_all": round(time.perf_counter() - began, 1),
        "others_share_of_cores": others_share,
        "skipped": bed.skipped,
    }
    table.write(options.out, description)
    print(text(table.rows()))
    if with_bounds := [row for row in table.rows() if row["bound"] is not None]:
        print("\nWhat should be reached:\n" + text(with_bounds))
    report(description, table, options.out)
    return 0


def one_round(bed: Bed, groups: Sequence[Group], which: int, rounds: int) -> list[Measured]:
    """Measure every group once that has a turn in round `which`, counted from 0."""
    measured: list[Measured] = []
    for group in groups:
        if group.rounds and which >= group.rounds:
            continue
        print(f"round {which + 1} of {rounds}: {group.name}", file=sys.stderr, flush=True)
        measured += group.measure(bed)
    return measured


def report(description: dict[str, object], table: Table, out: Path) -> None:
    """Print what a reader of the table must know."""
    shares = [row["load_generator_cpu_share"] for row in table.rows() if row["load_generator_cpu_share"] is not None]
    print(f"\n{description['processor']}, {description['cores']} cores; {description['seconds_in_all']} s; {out}")
    if shares:
        print(f"load generator: {description['load_generator']}, at most {max(shares):.0%} of one core")
    for what, why in (description["skipped"] or {}).items():  # type: ignore[attr-defined]
        print(f"left out: {what}: {why}")
    others_share = description["others_share_of_cores"]
    if isinstance(others_share, float) and others_share > _NOISY_SHARE:
        print(f"NOT QUIET: other processes used {others_share:.0%} of all cores meanwhile; read the ratios with care")


def gpu_problem() -> str:
    """Return why CUDA cannot be used, '' if it can."""
    try:
        Runtime("cuda")
    except DeviceError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
