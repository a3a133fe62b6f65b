"""A load generator in Python whose calls cost a few microseconds: frames are made beforehand, and nothing is decoded.

It drives the open loop: calls start by a schedule, whatever happened to earlier ones, and a call's time is counted from
when it was due. A generator that waits for answers before it sends leaves out just the calls that a stall would have
hit (coordinated omission). h2load cannot do this, for its timers tick in milliseconds; where there is no h2load, this
drives the closed loops too.

An answer counts when its stream has ended with exactly as many bytes of data as the verified answer; a gRPC error has
none.
"""

from __future__ import annotations

import contextlib
import math
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import children

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_REFUSED_STREAM = 7
_FRAME_HEADER = struct.Struct(">HBBBI")  # length (16 and 8 bits), type, flags, stream
_UINT32 = struct.Struct(">I")
_MAX_FRAME = 16384
_INITIAL_WINDOW = 65535
_MAX_WINDOW = 2**31 - 1
_REFILL_BYTES = 2**30
_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 1, 3, 4  # the settings' numbers
_MAX_STREAMS = 100  # at once on one connection, until the server has said how many it allows
_GIVE_UP_S = 30.0


class Ended(NamedTuple):
    """A call that is over: when it was due and when it was sent, whether its answer is right, else its last headers."""

    due: float
    sent: float
    is_right: bool
    headers: bytes


class Connection:
    """One HTTP/2 connection that makes the same unary gRPC call again and again. A call is known by when it was due.

    `header_table` False has the server send all headers in full, so that each block can be read by itself.
    """

    def __init__(
        self, host: str, port: int, path: str, body: bytes, answer_bytes: int, *, header_table: bool = True
    ) -> None:
        if len(body) > _INITIAL_WINDOW:
            raise children.BenchError(f"a request of {len(body)} bytes is too large for this generator; use h2load")
        self._answer_bytes = answer_bytes
        self._headers = _header_block(f"{host}:{port}", path)
        self._body = body
        self._held: deque[float] = deque()  # until the server lets us send them
        self._due: dict[int, float] = {}  # by stream
        self._sent: dict[int, float] = {}  # by stream
        self._received: dict[int, int] = {}  # bytes of data, by stream
        self._next_stream = 1
        self._max_streams = _MAX_STREAMS
        self._send_window = _INITIAL_WINDOW
        self._consumed = 0
        self._in = bytearray()
        self._out = bytearray(_PREFACE)
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _MAX_WINDOW)
        settings += b"" if header_table else struct.pack(">HI", _HEADER_TABLE_SIZE, 0)
        self._out += _frame(_SETTINGS, 0, 0, settings)
        self._out += _frame(_WINDOW_UPDATE, 0, 0, _UINT32.pack(_MAX_WINDOW - _INITIAL_WINDOW))
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)

    def call(self, due: float) -> None:
        """Start a call as soon as the server lets us."""
        self._held.append(due)
        self._start_held()

    def flush(self) -> bool:
        """Send what can be sent now; return whether something is left."""
        with contextlib.suppress(BlockingIOError):
            while self._out:
                del self._out[: self.socket.send(self._out)]
        return bool(self._out)

    @property
    def under_way(self) -> int:
        """How many calls have not ended, those held back included."""
        return len(self._due) + len(self._held)

    def receive(self) -> list[Ended]:
        """Take what has come; return the calls that it ended."""
        chunk = self.socket.recv(1 << 18)
        if not chunk:
            raise children.BenchError("the server closed the connection under load")
        self._in += chunk
        ended: list[Ended] = []
        at, size = 0, len(self._in)
        while size - at >= _FRAME_HEADER.size:
            high, low, kind, flags, stream = _FRAME_HEADER.unpack_from(self._in, at)
            start = at + _FRAME_HEADER.size
            stop = start + (high << 8 | low)
            if stop > size:
                break
            if kind == _DATA:
                self._received[stream] += stop - start
                self._consumed += stop - start
            elif kind == _RST_STREAM:
                self._reset(stream, self._in[start:stop])
            elif kind != _HEADERS:
                self._control(kind, flags, self._in[start:stop])
            if kind <= _HEADERS and flags & _END_STREAM:
                is_right = self._received.pop(stream) == self._answer_bytes
                headers = b"" if is_right else bytes(self._in[start:stop])
                ended.append(Ended(self._due.pop(stream), self._sent.pop(stream), is_right, headers))
            at = stop
        del self._in[:at]
        if self._consumed > _REFILL_BYTES:
            self._out += _frame(_WINDOW_UPDATE, 0, 0, _UINT32.pack(self._consumed))
            self._consumed = 0
        self._start_held()
        return ended

    def _control(self, kind: int, flags: int, payload: bytearray) -> None:
        if kind == _WINDOW_UPDATE:  # a stream's own window is never used up
            self._send_window += _UINT32.unpack(payload)[0]
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            if kind == _SETTINGS:
                self._max_streams = dict(struct.iter_unpack(">HI", payload)).get(
                    _MAX_CONCURRENT_STREAMS, self._max_streams
                )
            self._out += _frame(kind, _ACK, 0, bytes(payload) if kind == _PING else b"")
        elif kind == _GOAWAY:
            raise children.BenchError(f"the server broke off under load (HTTP/2 frame type {kind}: {payload.hex()})")

    def _reset(self, stream: int, payload: bytearray) -> None:
        """Take a reset: of a call answered before all of it was read, or of one never begun, which is sent again."""
        if stream not in self._due:
            return
        if _UINT32.unpack(payload)[0] != _REFUSED_STREAM:
            raise children.BenchError(f"the server broke off a call under load (HTTP/2 error {payload.hex()})")
        del self._received[stream], self._sent[stream]
        self._held.appendleft(self._due.pop(stream))

    def _start_held(self) -> None:
        while self._held and self._send_window >= len(self._body) and len(self._due) < self._max_streams:
            stream = self._next_stream
            self._next_stream += 2
            self._due[stream] = self._held.popleft()
            self._sent[stream] = time.perf_counter()
            self._received[stream] = 0
            self._send_window -= len(self._body)
            self._out += _frame(_HEADERS, _END_HEADERS, stream, self._headers)
            for at in range(0, len(self._body), _MAX_FRAME):
                piece = self._body[at : at + _MAX_FRAME]
                last = at + len(piece) == len(self._body)
                self._out += _frame(_DATA, _END_STREAM if last else 0, stream, piece)


def open_loop(
    *, port: int, path: str, body_file: str, answer_bytes: int, calls_per_s: float, calls: int, seed: int
) -> dict[str, float]:
    """Make calls as a Poisson process does, at `calls_per_s` on average; return their times in milliseconds."""
    connection = Connection("127.0.0.1", port, path, Path(body_file).read_bytes(), answer_bytes)
    times = random.Random(seed)
    clock = time.perf_counter
    cpu_began, began = time.process_time(), clock() + 0.05
    due = began
    schedule: deque[float] = deque()
    for _ in range(calls):
        due += times.expovariate(calls_per_s)
        schedule.append(due)
    give_up = due + _GIVE_UP_S
    taken_s: list[float] = []
    late_s: list[float] = []
    wrong = 0
    while len(taken_s) < calls:
        now = clock()
        while schedule and schedule[0] <= now:
            late_s.append(now - schedule[0])
            connection.call(schedule.popleft())
        is_left = connection.flush()
        wait_s = max(0.0, schedule[0] - clock()) if schedule else 1.0
        readable, _, _ = select.select([connection.socket], [connection.socket] if is_left else [], [], wait_s)
        if readable:
            ended = connection.receive()
            now = clock()
            taken_s += [now - call.due for call in ended]
            wrong += sum(not call.is_right for call in ended)
        if now > give_up:
            raise children.BenchError(f"{calls - len(taken_s)} of {calls} calls were not answered")
    elapsed_s = clock() - began
    connection.socket.close()
    _check(wrong, calls)
    return {
        **{f"p{share:g}": 1000 * quantile(taken_s, share / 100) for share in (50, 99, 99.9)},
        "late_p99": 1000 * quantile(late_s, 0.99),
        "cpu_share": (time.process_time() - cpu_began) / elapsed_s,
    }


def closed_loop(
    *, port: int, path: str, body_file: str, answer_bytes: int, in_flight: int, connections: int, calls: int
) -> dict[str, float]:
    """Make calls with `in_flight` of them under way at any time, spread over connections; return calls_per_s."""
    body = Path(body_file).read_bytes()
    all_of_them = [Connection("127.0.0.1", port, path, body, answer_bytes) for _ in range(connections)]
    by_socket = {each.socket: each for each in all_of_them}
    cpu_began, began = time.process_time(), time.perf_counter()
    started = min(in_flight, calls)
    ended = wrong = 0
    for which in range(started):
        all_of_them[which % connections].call(began)
    while ended < calls:
        left = [each.socket for each in all_of_them if each.flush()]
        readable, _, _ = select.select(list(by_socket), left, [], _GIVE_UP_S)
        if not readable and not left:
            raise children.BenchError(f"{calls - ended} of {calls} calls were not answered")
        for each in map(by_socket.__getitem__, readable):
            for call in each.receive():
                ended += 1
                wrong += not call.is_right
                if started < calls:
                    started += 1
                    each.call(began)
    elapsed_s = time.perf_counter() - began
    for each in all_of_them:
        each.socket.close()
    _check(wrong, calls)
    return {"calls_per_s": calls / elapsed_s, "cpu_share": (time.process_time() - cpu_began) / elapsed_s}


def _check(wrong: int, calls: int) -> None:
    if wrong:
        raise children.BenchError(f"{wrong} of {calls} calls were answered with an error or something else")


def quantile(values: list[float], share: float) -> float:
    """Return the value that so great a share of `values` does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME_HEADER.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def _header_block(authority: str, path: str) -> bytes:
    """Return a request's headers in HPACK (RFC 7541), by the static table alone."""

    def text(value: str) -> bytes:
        assert len(value) < 127  # one length byte
        return bytes([len(value)]) + value.encode()

    post, http = b"\x83", b"\x86"
    content_type = b"\x0f\x10"  # literal without indexing, name 31
    te = b"\x00" + text("te")
    return (
        post
        + http
        + (b"\x04" + text(path))
        + (b"\x01" + text(authority))
        + (content_type + text("application/grpc"))
        + (te + text("trailers"))
    )


if __name__ == "__main__":
    children.pin(0, int(sys.argv[1]) if len(sys.argv) > 1 else None)
    children.serve({"open": open_loop, "closed": closed_loop})
