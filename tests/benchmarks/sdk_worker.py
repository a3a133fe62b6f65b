"""The SDK under load, in a process of its own: what a user's program gets, its own share of the cores included."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from numpy.typing import NDArray

import children
from traffic import SEED, Model
from vaeserve import AsyncClient, Client

STREAM_CHUNK_ROWS = 1000
_MEMORY_ROWS = 10_000

Array = NDArray[Any]


class Clock:
    """The time since it was made: by the wall, and on processors, this process's and the server's."""

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._began = self._read()

    def per(self, count: float, unit: str) -> dict[str, float]:
        """Return how many of `unit` went by in a second, and the processor time of client and server for one, in us."""
        wall, client, server = (now - before for now, before in zip(self._read(), self._began, strict=True))
        return {f"{unit}_per_s": count / wall, "client_us": 1e6 * client / count, "server_us": 1e6 * server / count}

    def _read(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), children.cpu_s(self._server_pid)


def bulk(
    *,
    target: str,
    bundle: str,
    server_pid: int,
    verb: str,
    rows: int,
    dtype: str,
    rows_per_call: int | None,
    seconds: float,
) -> dict[str, float]:
    """Call one verb on `rows` rows again and again; return images_per_s, client_us and server_us."""
    with Client(target, rows_per_call=rows_per_call) as client:
        call = _call(client, Model(Path(bundle)), verb, rows, dtype)
        call()
        clock = Clock(server_pid)
        return clock.per(rows * _calls_in(call, seconds), "images")


def bulk_asyncio(
    *, target: str, bundle: str, server_pid: int, verb: str, rows: int, seconds: float
) -> dict[str, float]:
    """Do the same by AsyncClient."""

    async def work() -> dict[str, float]:
        async with AsyncClient(target) as client:
            call = _call(client, Model(Path(bundle)), verb, rows)
            await call()
            clock = Clock(server_pid)
            return clock.per(rows * await _calls_in_asyncio(call, seconds), "images")

    return asyncio.run(work())


def one_at_a_time(*, target: str, bundle: str, server_pid: int, verb: str, seconds: float) -> dict[str, float]:
    """Make calls of one row, each after the last one's answer; return calls_per_s, client_us and server_us."""
    with Client(target) as client:
        call = _call(client, Model(Path(bundle)), verb, 1)
        call()
        clock = Clock(server_pid)
        return clock.per(_calls_in(call, seconds), "calls")


def bare_one_at_a_time(*, target: str, path: str, server_pid: int, body_file: str, seconds: float) -> dict[str, float]:
    """Do the same with grpcio and nothing else, without protobuf."""
    request = Path(body_file).read_bytes()[5:]
    with grpc.insecure_channel(target) as channel:
        stub = channel.unary_unary(path, None, None)
        stub(request)
        clock = Clock(server_pid)
        return clock.per(_calls_in(lambda: stub(request), seconds), "calls")


def tasks(
    *, target: str, bundle: str, server_pid: int, verb: str, count: int, coalesce: bool, seconds: float
) -> dict[str, float]:
    """Let `count` tasks make calls of one row, each one after another; return the same of all their calls."""
    options: dict[str, Any] = {"coalesce": True} if coalesce else {}

    async def work() -> dict[str, float]:
        async with AsyncClient(target, **options) as client:
            call = _call(client, Model(Path(bundle)), verb, 1)
            await asyncio.gather(*(call() for _ in range(count)))
            clock = Clock(server_pid)
            calls = await asyncio.gather(*(_calls_in_asyncio(call, seconds) for _ in range(count)))
            return clock.per(sum(calls), "calls")

    return asyncio.run(work())


def stream(*, target: str, bundle: str, server_pid: int, rows: int) -> dict[str, float]:
    """Encode `rows` images from an iterator; return images_per_s, and memory after 10 000 of them and at the end."""
    chunk = Model(Path(bundle)).images(STREAM_CHUNK_ROWS)

    def images() -> Iterator[Array]:
        for _ in range(rows // STREAM_CHUNK_ROWS):
            yield chunk.copy()

    first: tuple[int, int] | None = None
    done = 0
    with Client(target) as client:
        began = time.perf_counter()
        for codes in client.encode_stream(images()):
            done += len(codes)
            if first is None and done >= _MEMORY_ROWS:
                first = _memory(server_pid)
        elapsed_s = time.perf_counter() - began
    end = _memory(server_pid)
    first = first or end
    return {
        "images_per_s": done / elapsed_s,
        "client_first_bytes": first[0],
        "client_end_bytes": end[0],
        "server_first_bytes": first[1],
        "server_end_bytes": end[1],
    }


def _memory(server_pid: int) -> tuple[int, int]:
    return children.resident_bytes(os.getpid()), children.resident_bytes(server_pid)


def _call(client: Any, model: Model, verb: str, rows: int, dtype: str = "float32") -> Callable[[], Any]:
    """Return one call of a verb, for either client."""
    if verb == "encode":
        images = model.images(rows)
        return lambda: client.encode(images)
    if verb == "decode":
        latents = model.latents(rows)
        return lambda: client.decode(latents, dtype=dtype)
    return lambda: client.sample(rows, seed=SEED, dtype=dtype)


def _calls_in(call: Callable[[], object], seconds: float) -> int:
    """Return how many calls were made one after another until that time was over."""
    end = time.perf_counter() + seconds
    for done in itertools.count(1):
        call()
        if time.perf_counter() >= end:
            return done
    raise AssertionError("unreachable")


async def _calls_in_asyncio(call: Callable[[], Awaitable[object]], seconds: float) -> int:
    end = time.perf_counter() + seconds
    for done in itertools.count(1):
        await call()
        if time.perf_counter() >= end:
            return done
    raise AssertionError("unreachable")


if __name__ == "__main__":
    children.serve(
        {each.__name__: each for each in (bulk, bulk_asyncio, one_at_a_time, bare_one_at_a_time, tasks, stream)}
    )
