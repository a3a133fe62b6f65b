"""The load of the overload proof: full load, then several times as much as can be done, then full load again.

Full load is a closed loop with as many calls under way as the server's queue holds: the most that nobody is refused at.
Overload is an open loop: calls arrive at random, whatever happened to earlier ones, and a call's time counts from when
it was due. What comes after is full load again on the same connections, in slices of time, so that it is seen when the
server does as much as before.
"""

from __future__ import annotations

import random
import select
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hpack

import children
from http2_load import Connection, Ended, quantile

_SLICE_S = 0.2
_WARM_S = 1.0
_MEMORY_S = 0.5
_READ_ONE_IN = 16  # refusals whose headers are read
_GIVE_UP_S = 30.0
_RESOURCE_EXHAUSTED = "8"


@dataclass
class Outcome:
    """What became of the calls of one phase; times in seconds."""

    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    held_s: list[float] = field(default_factory=list)  # from when a call was due until it was sent
    ends: list[float] = field(default_factory=list)  # of the accepted ones, by the clock
    headers: list[bytes] = field(default_factory=list)  # of some of the others
    memory: list[int] = field(default_factory=list)
    began: float = 0.0

    def take(self, ended: list[Ended], now: float) -> None:
        """Note calls that have ended."""
        for call in ended:
            self.held_s.append(call.sent - call.due)
            if call.is_right:
                self.accepted_s.append(now - call.due)
                self.ends.append(now)
            else:
                if len(self.refused_s) % _READ_ONE_IN == 0:
                    self.headers.append(call.headers)
                self.refused_s.append(now - call.due)


class Load:
    """Connections to one server, on which phases of load follow each other."""

    def __init__(self, connections: list[Connection], pid: int) -> None:
        self._connections = connections
        self._by_socket = {each.socket: each for each in connections}
        self._pid = pid
        self._turn = 0

    def full(self, in_flight: int, seconds: float) -> Outcome:
        """Keep `in_flight` calls under way for some time; the last of them are left under way."""
        outcome = Outcome(began=time.perf_counter())
        end = outcome.began + seconds
        for _ in range(in_flight - sum(each.under_way for each in self._connections)):
            self._call(outcome.began)
        while (now := time.perf_counter()) < end:
            for each, ended in self._turns(end - now):
                outcome.take(ended, time.perf_counter())
                for _ in ended:
                    if sum(other.under_way for other in self._connections) < in_flight:
                        each.call(time.perf_counter())
        return outcome

    def settle(self) -> None:
        """Wait until no call is under way."""
        give_up = time.perf_counter() + _GIVE_UP_S
        while any(each.under_way for each in self._connections):
            if time.perf_counter() > give_up:
                raise children.BenchError("the server left calls without an answer")
            for _ in self._turns(1.0):
                pass

    def over(self, calls_per_s: float, seconds: float, seed: int) -> Outcome:
        """Let calls arrive as a Poisson process does, whatever becomes of them; the last are left under way."""
        times = random.Random(seed)
        outcome = Outcome(began=time.perf_counter())
        due = outcome.began
        end = due + seconds
        look = due
        while (now := time.perf_counter()) < end:
            while due <= now:
                outcome.late_s.append(now - due)
                self._call(due)
                due += times.expovariate(calls_per_s)
            if now >= look:
                look = now + _MEMORY_S
                outcome.memory.append(children.resident_bytes(self._pid))
            for _, ended in self._turns(due - time.perf_counter()):
                outcome.take(ended, time.perf_counter())
        return outcome

    def _call(self, due: float) -> None:
        self._turn = (self._turn + 1) % len(self._connections)
        self._connections[self._turn].call(due)

    def _turns(self, wait_s: float) -> Iterator[tuple[Connection, list[Ended]]]:
        left = [each.socket for each in self._connections if each.flush()]
        readable, _, _ = select.select(list(self._by_socket), left, [], max(0.0, wait_s))
        for connection in map(self._by_socket.__getitem__, readable):
            yield connection, connection.receive()


def overload(
    *,
    port: int,
    pid: int,
    path: str,
    body_file: str,
    answer_bytes: int,
    connections: int,
    in_flight: int,
    full_s: float,
    times: float,
    seconds: float,
    recovered: float,
) -> dict[str, Any]:
    """Put the server under full load, `times` as much, and full load again; return what came of it.

    The server is back when it answers `recovered` times as many calls as before.
    """
    body = Path(body_file).read_bytes()
    opened = [Connection("127.0.0.1", port, path, body, answer_bytes, header_table=False) for _ in range(connections)]
    load = Load(opened, pid)
    load.full(in_flight, _WARM_S)
    full = load.full(in_flight, full_s)
    load.settle()
    capacity = len(full.accepted_s) / full_s
    cpu_began, server_cpu_began = time.process_time(), children.cpu_s(pid)
    over = load.over(times * capacity, seconds, seed=1)
    cpu_share = (time.process_time() - cpu_began) / seconds
    server_cpu_share = (children.cpu_s(pid) - server_cpu_began) / seconds
    after = load.full(in_flight, max(full_s, 2.0))
    load.settle()
    for each in opened:
        each.socket.close()
    statuses = Counter(map(_status, over.headers))
    half = len(over.memory) // 2
    return {
        "capacity": capacity,
        "refused_at_full": len(full.refused_s),
        "full_ms": _milliseconds(full.accepted_s),
        "offered": len(over.late_s) / seconds,
        "accepted": len(over.accepted_s) / seconds,
        "accepted_ms": _milliseconds(over.accepted_s),
        "refused": len(over.refused_s) / seconds,
        "refused_ms": _milliseconds(over.refused_s),
        "statuses": dict(statuses),
        "late_ms": _milliseconds(over.late_s),
        "held_ms": _milliseconds(over.held_s),
        "memory_bytes": [max(over.memory[: half + 1]), max(over.memory[half:])],
        "recovery_s": _recovery_s(after, recovered * capacity),
        "cpu_share": cpu_share,
        "server_cpu_share": server_cpu_share,
    }


def _recovery_s(after: Outcome, calls_per_s: float) -> float:
    """Return after how long a slice of time first had so many calls answered; -1 if none had."""
    slices = Counter(int((end - after.began) / _SLICE_S) for end in after.ends)
    enough = calls_per_s * _SLICE_S
    return next((_SLICE_S * (which + 1) for which in sorted(slices) if slices[which] >= enough), -1.0)


def _status(headers: bytes) -> str:
    """Return in words how a call ended that was not answered."""
    fields = dict(hpack.Decoder().decode(headers))
    code = fields.get("grpc-status", f"HTTP {fields.get(':status')}")
    if code != _RESOURCE_EXHAUSTED:
        return f"status {code}: {fields.get('grpc-message', '')}"
    return "refused, with push-back" if int(fields.get("grpc-retry-pushback-ms", 0)) > 0 else "refused, no push-back"


def _milliseconds(taken_s: list[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: 1000 * quantile(taken_s, share) for name, share in shares.items()} if taken_s else {}


if __name__ == "__main__":
    children.pin(0, int(sys.argv[1]) if len(sys.argv) > 1 else None)
    children.serve({"overload": overload})
