"""What is measured, in groups. A group measures both sides of its ratios, one right after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from bed import ECHO, ENVOY, GRPC, Bed, port_of
from table import Bound, Measured
from traffic import VERBS, Verb
from vaeserve import AsyncClient
from vaeserve_server.settings import Settings

ALONE = "onnxruntime"
TRITON = "triton"
_IN_FLIGHT = (1, 8, 32, 128)
_LOADS_PERCENT = (50, 70, 90)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_CALL_ROWS = (1, 4, 16, 64, 256, 512)
BEST = 0
_BULK_ROWS = 8192
_BULK_BYTES = 2**27
_TASKS = 64
_CONNECTIONS = 8
_MB = 1e6
# Calls a second of Triton 2.51's C++ server with its ONNX Runtime backend, single images, on 2 cores shared with its
# load generator; and what ONNX Runtime alone did there at batch 64. Scaled by what it does here.
_TRITON = {"encode": {8: 7_000, 32: 10_700, 128: 13_500}, "decode": {32: 8_900}}
_TRITON_ALONE = {"encode": 29_400, "decode": 21_000}
_TRITON_ROWS = 64
# What the ratio to the echo should reach: by transport, and calls in flight.
_ECHO_BOUNDS = {(GRPC, 32): 0.75, (ENVOY, 32): 1.8, (ENVOY, 128): 2.4}
_ECHO_BOUND_GPU = 0.8


class Group(NamedTuple):
    """Measurements that belong together, made in the first `rounds` rounds, 0: in all.

    `needs` names groups whose values are baselines.
    """

    name: str
    measure: Callable[[Bed], Iterable[Measured]]
    needs: tuple[str, ...] = ()
    rounds: int = 0


def groups(device: str) -> list[Group]:
    """Return all groups for a device, in the order in which they are measured."""
    if device == "cuda":
        return _gpu_groups()
    return [
        *_alone_groups(),
        *(group for verb in VERBS for group in _verb_groups(verb)),
        Group("first-answer", first_answer),
        Group("workers", partial(workers, VERBS[0])),
        Group("stream", stream, rounds=1),
    ]


def with_needs(groups: Sequence[Group], chosen: Sequence[Group]) -> list[Group]:
    """Return the chosen groups and those they need."""
    names = {group.name for group in chosen} | {name for group in chosen for name in group.needs}
    return [group for group in groups if group.name in names]


def _alone_groups() -> list[Group]:
    return [Group(f"{ALONE}-{graph}", partial(onnxruntime_alone, graph)) for graph in ("encoder", "decoder")]


def _verb_groups(verb: Verb) -> list[Group]:
    alone = (f"{ALONE}-{verb.graph}",)
    found = [
        Group(f"{verb.name}-in-flight", partial(in_flight, verb)),
        Group(f"{verb.name}-open-loop", partial(open_loop, verb)),
        *([Group(f"{verb.name}-same-load", partial(same_load, verb))] if verb.name == "encode" else []),
        Group(f"{verb.name}-batch", partial(batch, verb), alone),
        Group(f"{verb.name}-bulk", partial(bulk, verb, None), alone),
        Group(f"{verb.name}-one-at-a-time", partial(one_at_a_time, verb)),
        Group(f"{verb.name}-tasks", partial(tasks, verb)),
    ]
    # Sample has no bounds of its own: it goes Decode's way through the decoder.
    return [group._replace(rounds=2) for group in found] if verb.name == "sample" else found


def _gpu_groups() -> list[Group]:
    encode, decode, _ = VERBS
    return [
        *_alone_groups(),
        Group("encode-rows-256", partial(bulk, encode, 256), (f"{ALONE}-encoder",)),
        Group("decode-rows-256", partial(bulk, decode, 256), (f"{ALONE}-decoder",)),
        *(Group(f"{verb.name}-in-flight", partial(in_flight, verb)) for verb in VERBS),
        Group("first-answer", first_answer),
    ]


def onnxruntime_alone(graph: str, bed: Bed) -> Iterator[Measured]:
    """ONNX Runtime in process: at each batch size the best of its settings, and the best of all."""
    batches = _batches(bed)
    answer = bed.onnxruntime.ask(do="measure", graph=graph, batches=batches, seconds=bed.effort.seconds / 8)
    best: dict[int, str] = {}
    for rows in batches:
        settings: dict[str, float] = answer[str(rows)]
        best[rows] = max(settings, key=settings.__getitem__)
        note = f"threads in a run x runs at once: {best[rows]}"
        yield Measured(f"{graph}, batch {rows}", ALONE, settings[best[rows]], "images/s", note=note)
    best_rows = max(batches, key=lambda rows: answer[str(rows)][best[rows]])
    bed.best_alone[graph] = best | {BEST: best[best_rows]}
    bed.best_batch[graph] = best_rows


def _batches(bed: Bed) -> list[int]:
    """Return the batch sizes that the model takes."""
    return [rows for rows in _BATCHES if rows <= bed.max_rows]


def alone_beside(graph: str, rows: int, workload: str, bed: Bed) -> Measured:
    """ONNX Runtime in the setting that was best for `rows` (BEST: of all) once more, beside `workload` and as long.

    The largest of many short measurements is partly luck, and the machine's speed drifts; so it only chooses.
    """
    setting, batch_rows = bed.best_alone[graph][rows], bed.best_batch[graph] if rows == BEST else rows
    answer = bed.onnxruntime.ask(
        do="measure", graph=graph, batches=[batch_rows], seconds=bed.effort.seconds, setting=setting
    )
    note = f"batch {batch_rows}, threads in a run x runs at once: {setting}"
    return Measured(f"{workload}, {graph} alone", ALONE, answer[str(batch_rows)][setting], "images/s", note=note)


def in_flight(verb: Verb, bed: Bed) -> Iterator[Measured]:
    """Calls of one row, closed loop, beside bare echoes of the same bytes, and beside what Triton would do here."""
    triton = _triton(verb, bed) if bed.device == "cpu" else {}
    for count in _IN_FLIGHT:
        workload = f"{verb.name}, {count} in flight"
        costs = []
        for server in (*bed.echoes, *bed.servers):
            got = bed.closed_loop(server, verb, 1, count)
            bound = _echo_bound(verb, server.transport, count, bed.device)
            baseline = None if server is bed.echo else (workload, ECHO)
            speed = got["calls_per_s"]
            yield Measured(workload, server.transport, speed, "calls/s", baseline, bound, got["cpu_share"])
            costs.append((f"{workload}, server's time", server.transport, got["server_us"]))
            if server.transport == ENVOY and count in triton:
                yield from _beside_triton(verb, workload, speed, triton[count])
        for what, transport, us in costs:
            yield Measured(what, transport, us, "cpu us/call", None if transport == ECHO else (what, ECHO))


def _echo_bound(verb: Verb, transport: str, count: int, device: str) -> Bound | None:
    ratio = _ECHO_BOUNDS.get((transport, count)) if verb.name == "encode" else None
    if ratio is not None and device == "cuda":
        ratio = _ECHO_BOUND_GPU if transport == GRPC else None
    return None if ratio is None else Bound(">=", ratio)


def _triton(verb: Verb, bed: Bed) -> dict[int, float]:
    """Return what Triton is taken to do here, in calls a second by calls in flight; empty for what was not measured."""
    if verb.name not in _TRITON or bed.max_rows < _TRITON_ROWS:
        return {}
    seconds = bed.effort.seconds / 4
    answer = bed.onnxruntime.ask(do="measure", graph=verb.graph, batches=[_TRITON_ROWS], seconds=seconds)
    factor = max(answer[str(_TRITON_ROWS)].values()) / _TRITON_ALONE[verb.name]
    return {count: calls * factor for count, calls in _TRITON[verb.name].items()}


def _beside_triton(verb: Verb, workload: str, speed: float, triton: float) -> Iterator[Measured]:
    scaled = (f"{workload}, by Triton", TRITON)
    yield Measured(*scaled, triton, "calls/s", note="its figure elsewhere x ONNX Runtime here / ONNX Runtime there")
    bound = Bound(">=", 0.8 if verb.name == "encode" else 1.0)
    yield Measured(scaled[0], ENVOY, speed, "calls/s", scaled, bound)


def open_loop(verb: Verb, bed: Bed) -> Iterator[Measured]:
    """Calls of one row that arrive at random at a share of capacity, which is the closed loop's speed just before."""
    for server in bed.servers:
        full = bed.closed_loop(server, verb, 1, max(_IN_FLIGHT))
        capacity = full["calls_per_s"]
        yield Measured(f"{verb.name}, capacity", server.transport, capacity, "calls/s", cpu_share=full["cpu_share"])
        for percent in _LOADS_PERCENT:
            workload = f"{verb.name}, open loop at {percent} %"
            got = bed.open_loop(server, verb, capacity * percent / 100, seed=percent)
            median = (f"{workload}, p50", server.transport)
            for name in ("p50", "p99", "p99.9"):
                bound = Bound("<=", 4.0) if (verb.name, percent, name) == ("encode", 70, "p99") else None
                yield Measured(
                    f"{workload}, {name}",
                    server.transport,
                    got[name],
                    "ms",
                    None if name == "p50" else median,
                    bound,
                    got["cpu_share"],
                    note=f"the generator was at most {got['late_p99']:.2g} ms late in 99 % of its calls",
                )


def same_load(verb: Verb, bed: Bed) -> Iterator[Measured]:
    """Every transport at one absolute load: 70 % of what grpcio's can take."""
    if len(bed.servers) < 2:
        return
    calls_per_s = 0.7 * bed.closed_loop(bed.servers[0], verb, 1, max(_IN_FLIGHT))["calls_per_s"]
    workload = f"{verb.name}, open loop at 70 % of {GRPC}'s"
    for server in bed.servers:
        got = bed.open_loop(server, verb, calls_per_s, seed=70)
        for name in ("p50", "p99"):
            key = f"{workload}, {name}"
            baseline = None if server.transport == GRPC else (key, GRPC)
            bound = Bound("<=", 1.0) if baseline and name == "p99" else None
            yield Measured(key, server.transport, got[name], "ms", baseline, bound, got["cpu_share"])


def batch(verb: Verb, bed: Bed) -> Iterator[Measured]:
    """Calls of many rows, one after another: what a row costs; and calls of 64 rows with 4 in flight."""
    flights = [(rows, 1) for rows in _CALL_ROWS if rows <= bed.max_rows]
    if bed.max_rows >= 64:
        flights.append((64, 4))
    for rows, count in flights:
        workload = f"{verb.name}, batch {rows}, {count} in flight"
        alone = alone_beside(verb.graph, rows, workload, bed)
        yield alone
        for server in bed.servers:
            bound = None
            if (verb.name, rows, count) == ("encode", 64, 4):
                bound = Bound(">=", 0.85 if server.transport == GRPC else 0.8)
            got = bed.closed_loop(server, verb, rows, count, share=1.0 if rows == 64 else 0.5)
            speed = rows * got["calls_per_s"]
            yield Measured(
                workload, server.transport, speed, "images/s", (alone.workload, ALONE), bound, got["cpu_share"]
            )
            yield Measured(f"{workload}, server's time", server.transport, got["server_us"] / rows, "cpu us/image")


def bulk(verb: Verb, rows_per_call: int | None, bed: Bed) -> Iterator[Measured]:
    """One array of many rows through the SDK, beside the best that ONNX Runtime does alone.

    Of a model that takes fewer rows than `rows_per_call` in a call, calls have the largest batch size that it takes.
    """
    if rows_per_call is not None:
        rows_per_call = max(rows for rows in _batches(bed) if rows <= rows_per_call)
    image_bytes = 4 * int(np.prod(bed.model.card.image_shape))
    rows = min(_BULK_ROWS, _BULK_BYTES // image_bytes)
    name = f"{verb.name}, bulk" if rows_per_call is None else f"{verb.name}, bulk, {rows_per_call} rows a call"
    for server in bed.servers:
        beside = alone_beside(verb.graph, rows_per_call or BEST, f"{name}, {server.transport}", bed)
        yield beside
        alone = (beside.workload, ALONE)
        bound = None
        if verb.name != "sample" and server.transport == GRPC:
            bound = Bound(">=", 0.7 if bed.device == "cuda" else 0.8)
        dtypes = ["float32"] if verb.name == "encode" else ["float32", "uint8"]
        for dtype in dtypes:
            got = bed.ask_sdk("bulk", server, verb, rows=rows, dtype=dtype, rows_per_call=rows_per_call)
            workload = name if dtype == "float32" else f"{name}, uint8 images"
            speed = got["images_per_s"]
            yield Measured(workload, server.transport, speed, "images/s", alone, bound if dtype == "float32" else None)
            yield from _times(workload, server.transport, got, "image")
        if rows_per_call is None:
            speed = bed.ask_sdk("bulk_asyncio", server, verb, rows=rows)["images_per_s"]
            yield Measured(f"{name}, asyncio", server.transport, speed, "images/s", alone)


def _times(workload: str, transport: str, got: dict[str, float], unit: str) -> Iterator[Measured]:
    """Where the two cores' time went: the server's, its graph included, and the client's."""
    for side in ("server", "client"):
        yield Measured(f"{workload}, {side}'s time", transport, got[f"{side}_us"], f"cpu us/{unit}")


def one_at_a_time(verb: Verb, bed: Bed) -> Iterator[Measured]:
    """One blocking call after another: what the SDK adds to grpcio, against the echo and against each server."""
    for server in (bed.echo, *bed.servers):
        bare = (f"{verb.name}, one at a time, no SDK", server.transport)
        bound = Bound("<=", 1.25) if server is bed.echo and verb.name == "encode" else None
        yield Measured(*bare, bed.bare_call_us(server, verb), "us/call")
        us = 1e6 / bed.ask_sdk("one_at_a_time", server, verb)["calls_per_s"]
        yield Measured(f"{verb.name}, one at a time", server.transport, us, "us/call", bare, bound)


def tasks(verb: Verb, bed: Bed) -> Iterator[Measured]:
    """Calls of one row by many tasks of one AsyncClient, each by itself and coalesced."""
    for server in bed.servers:
        plain = (f"{verb.name}, {_TASKS} tasks", server.transport)
        got = bed.ask_sdk("tasks", server, verb, count=_TASKS, coalesce=False)
        yield Measured(*plain, got["calls_per_s"], "calls/s")
        yield from _times(*plain, got, "call")
        if "coalesce" not in inspect.signature(AsyncClient).parameters:
            bed.skipped["coalesced tasks"] = "this SDK's AsyncClient has no coalesce"
            continue
        got = bed.ask_sdk("tasks", server, verb, count=_TASKS, coalesce=True)
        bound = Bound(">=", 4.0) if verb.name == "encode" and server.transport == GRPC else None
        yield Measured(f"{plain[0]}, coalesced", server.transport, got["calls_per_s"], "calls/s", plain, bound)
        yield from _times(f"{plain[0]}, coalesced", server.transport, got, "call")


def first_answer(bed: Bed) -> Iterator[Measured]:
    """From a server's start to its first answer."""
    for server in bed.servers:
        yield Measured("start to first answer", server.transport, bed.first_answer_s(server.transport), "s")


def workers(verb: Verb, bed: Bed) -> Iterator[Measured]:
    """Server processes on one port, with calls over several connections."""
    if "workers" not in Settings.model_fields:
        bed.skipped["workers"] = "this server has no --workers"
        return
    single = (f"{verb.name}, 128 in flight, 1 worker", GRPC)
    for count, workload in ((1, single[0]), (2, f"{verb.name}, 128 in flight, 2 workers")):
        server = bed.workers(count)
        got = bed.closed_loop(server, verb, 1, 128, connections=_CONNECTIONS)
        baseline = None if count == 1 else single
        yield Measured(workload, GRPC, got["calls_per_s"], "calls/s", baseline, None, got["cpu_share"])


def stream(bed: Bed) -> Iterator[Measured]:
    """A long iterator through encode_stream, between processes that have done nothing before."""
    rows = bed.effort.stream_rows
    for transport in [server.transport for server in bed.servers]:
        with bed.new_server(transport) as child, bed.new_sdk() as sdk:
            target = f"127.0.0.1:{port_of(child.line())}"
            got = sdk.ask(do="stream", target=target, bundle=str(bed.model.folder), server_pid=child.pid, rows=rows)
        yield Measured(f"encode, iterator of {rows}", transport, got["images_per_s"], "images/s")
        for side in ("client", "server"):
            first = (f"{side}'s memory after 10000 images", transport)
            yield Measured(*first, got[f"{side}_first_bytes"] / _MB, "MB")
            end = got[f"{side}_end_bytes"] / _MB
            bound = Bound("<=", 1.05) if transport == GRPC else None
            yield Measured(f"{side}'s memory after {rows} images", transport, end, "MB", first, bound)
