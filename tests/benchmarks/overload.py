"""The overload proof: several times as many calls as the server can answer, and what becomes of them.

    make overload                                    a minute of 3 times capacity, behind grpcio
    make overload ARGS="--transport envoy"           the same behind Envoy
    make overload ARGS="--lorises 1000"              with a thousand connections that only keep the server waiting
    make overload ARGS="--seconds 5 --times 5 --verb encode --rows 1"

Capacity and the times under full load are measured first, with as many calls under way as the queue holds: the most
that nobody is refused at. Then calls arrive at random at a multiple of that, whatever becomes of earlier ones, and at
last there is full load again. Exits with 1 if a bound is missed; each has a flag, for machines that have other work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lorises
from bed import ENVOY, GRPC, Bed, Effort
from children import BenchError, worker
from traffic import VERBS, find_model

# Full load lasts a quarter as long as the overload, or what a machine does now and then would be in one and not in the
# other; but so long at least.
_FULL_SHARE, _FULL_S = 0.25, 3.0
_CONNECTIONS = 8
_REFUSED = "refused, with push-back"


class Row(NamedTuple):
    """One line of the table. `is_met` is None where nothing is promised."""

    what: str
    value: str
    bound: str = ""
    is_met: bool | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the proof; return 0 if all bounds are met, 1 if one is not or nothing could be measured."""
    options = parse(arguments)
    try:
        rows = table(options, measure(options))
    except BenchError as error:
        print(f"overload: {error}", file=sys.stderr)
        return 1
    marks = {None: "", True: "met", False: "NOT MET"}
    cells = [(row.what, row.value, row.bound, marks[row.is_met]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    return int(any(row.is_met is False for row in rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        prog="overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", type=Path, default=Path("models"), help="folder of models (default: models)")
    add("--model", help="which of them, if there are several; its newest version is taken")
    add("--transport", choices=[GRPC, ENVOY], default=GRPC, help="what carries the calls (default: grpc)")
    add("--seconds", type=float, default=60.0, help="how long the overload lasts (default: 60)")
    add("--times", type=float, default=3.0, help="how many times the capacity (default: 3)")
    add("--verb", choices=[verb.name for verb in VERBS], default="decode", help="what is called (default: decode)")
    add("--rows", type=int, default=64, help="rows in one call (default: 64)")
    add("--queue-rows", type=int, default=1024, help="the server's --max-queue-rows (default: 1024)")
    add("--max-calls", type=int, default=256, help="the server's --max-calls (default: 256)")
    add("--lorises", type=int, default=0, help="connections that send a byte now and then, all the while (default: 0)")
    add("--p99-ratio", type=float, default=2.0, help="bound: p99 of accepted calls to that of full load (default: 2)")
    add("--refused-ms", type=float, default=20.0, help="bound: p99 of refused calls (default: 20)")
    add("--memory-ratio", type=float, default=1.1, help="bound: memory, second half to first (default: 1.1)")
    add("--recovery-s", type=float, default=1.0, help="bound: until the capacity is back (default: 1)")
    add("--recovered", type=float, default=0.9, help="share of the capacity that counts as being back (default: 0.9)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Put a server under the load and return what `overload_load` says of it."""
    model = find_model(options.models, options.model)
    verb = next(verb for verb in VERBS if verb.name == options.verb)
    with tempfile.TemporaryDirectory() as name, Bed(model, options.models, Path(name), "cpu", Effort(1, 1, 1)) as bed:
        flags = [f"--max-queue-rows={options.queue_rows}", f"--max-calls={options.max_calls}"]
        server = bed.serve(options.transport, *flags)
        sent = bed.verified(server, verb, options.rows)
        load = worker("overload_load.py", Path(name) / "load.log", *bed.load_core)
        with load, lorises.crowd(server.port, options.lorises) as crowd:
            answer: dict[str, Any] = load.ask(
                do="overload",
                port=server.port,
                pid=server.child.pid,
                path=sent.path,
                body_file=str(sent.body_file),
                answer_bytes=sent.answer_bytes,
                connections=_CONNECTIONS,
                in_flight=max(1, min(options.queue_rows // options.rows, options.max_calls)),
                full_s=min(max(_FULL_S, _FULL_SHARE * options.seconds), options.seconds),
                times=options.times,
                seconds=options.seconds,
                recovered=options.recovered,
            )
            answer["lorises_left"] = crowd.left()
    return answer


def table(options: argparse.Namespace, seen: dict[str, Any]) -> list[Row]:
    """Return the lines, with the bounds that `options` has."""
    full, accepted, refused = seen["full_ms"], seen["accepted_ms"], seen["refused_ms"]
    others = {words: count for words, count in seen["statuses"].items() if words != _REFUSED}
    rows = [
        Row(f"{options.verb} of {options.rows} rows, {options.transport}", ""),
        Row("capacity", f"{seen['capacity']:.0f} calls/s"),
        Row("full load", f"p50 {full['p50']:.1f} ms, p99 {full['p99']:.1f} ms"),
        Row("offered", f"{seen['offered']:.0f} calls/s for {options.seconds:g} s"),
        Row("accepted", f"{seen['accepted']:.0f} calls/s, {seen['accepted'] / seen['capacity']:.0%} of capacity"),
    ]
    if accepted:
        ratio = accepted["p99"] / full["p99"]
        bound = f"p99 <= {options.p99_ratio:g} of full load's"
        words = f"p50 {accepted['p50']:.1f} ms, p99 {accepted['p99']:.1f} ms: {ratio:.2f} of full load's"
        rows.append(Row("accepted, time", words, bound, ratio <= options.p99_ratio))
    else:
        rows.append(Row("accepted, time", "none was answered", "some", is_met=False))
    rows.append(Row("refused", f"{seen['refused']:.0f} calls/s", "> 0", bool(refused)))
    if refused:
        words = f"p50 {refused['p50']:.1f} ms, p99 {refused['p99']:.1f} ms, longest {refused['max']:.1f} ms"
        met = refused["p99"] <= options.refused_ms
        rows.append(Row("refused, time", words, f"p99 <= {options.refused_ms:g} ms", met))
        words = ", ".join(f"{count} {what}" for what, count in others.items())
        rows.append(Row("refused otherwise, of a sample", words or "none", "none", not others))
    first, second = (size / 2**20 for size in seen["memory_bytes"])
    rows.append(
        Row(
            "memory",
            f"{first:.0f} MB in the first half, {second:.0f} MB in the second",
            f"<= {options.memory_ratio:g}",
            second <= options.memory_ratio * first,
        )
    )
    back_s = seen["recovery_s"]
    is_back = 0 <= back_s <= options.recovery_s
    words = f"after {back_s:.1f} s" if back_s >= 0 else "never while it was watched"
    rows.append(Row(f"{options.recovered:.0%} of the capacity is back", words, f"<= {options.recovery_s:g} s", is_back))
    if options.lorises:
        rows.append(Row("slow connections", f"{options.lorises} opened, {seen['lorises_left']} held to the end"))
    late, held = seen["late_ms"]["p99"], seen["held_ms"]
    if held:  # all connections have as many calls under way as they may: more comes than is taken in or refused
        words = f"p50 {held['p50']:.1f} ms, p99 {held['p99']:.1f} ms"
        rows.append(Row("of all these times, at the caller", words))
    rows.append(Row("the server", f"{seen['server_cpu_share']:.0%} of a core"))
    rows.append(Row("the load itself", f"p99 {late:.1f} ms late, {seen['cpu_share']:.0%} of a core"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
