"""A bare HTTP/2 client for what no gRPC client would send."""

from __future__ import annotations

import socket
import struct
import time
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions

_LIMIT_S = 20.0
_ENDS = (h2.events.StreamEnded, h2.events.StreamReset)
RESET, CLOSED = "reset", "closed"


def frame(message: bytes, compressed: int = 0, length: int | None = None) -> bytes:
    """Return a gRPC frame, with a length that need not be the message's."""
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


class Connection:
    """One connection that reads only when it is told to."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), _LIMIT_S)
        settings = h2.config.H2Configuration(header_encoding="utf8", validate_outbound_headers=False)
        self.http = h2.connection.H2Connection(settings)
        self.http.initiate_connection()
        self.flush()
        self.headers: dict[int, dict[str, str]] = {}
        self.ended: dict[int, str] = {}
        self.gone = False  # told to go elsewhere

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def flush(self) -> None:
        """Send what is to be sent."""
        self.socket.sendall(self.http.data_to_send())

    def open(self, path: str, method: str = "POST", **headers: str) -> int:
        """Send the headers of a call; names with _ for -, and None to leave one out."""
        stream = self.http.get_next_available_stream_id()
        fields = {"content_type": "application/grpc", "te": "trailers"} | headers
        given = [(name.replace("_", "-"), value) for name, value in fields.items() if value]
        pseudo = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "test")]
        self.http.send_headers(stream, pseudo + given)
        self.flush()
        return stream

    def send(self, stream: int, body: bytes, *, end: bool = True) -> None:
        """Send a part of a body that fits the window, or its end."""
        self.http.send_data(stream, body, end_stream=end)
        self.flush()

    def send_all(self, stream: int, body: bytes) -> None:
        """Send a body of any length and its end, as fast as the window opens, or until the server has had enough."""
        while body and stream not in self.ended:
            window = min(self.http.local_flow_control_window(stream), 16384)
            if window:
                part, body = body[:window], body[window:]
                self.send(stream, part, end=not body)
            elif not self.read():
                return

    def call(self, path: str, body: bytes, **headers: str) -> str:
        """Make a call; return its grpc-status, or how it ended without one."""
        stream = self.open(path, **headers)
        self.send(stream, body)
        return self.outcome(stream)

    def outcome(self, stream: int) -> str:
        """Read until a stream ends; return its grpc-status, its HTTP status if that is not 200, or RESET or CLOSED."""
        deadline = time.monotonic() + _LIMIT_S
        while stream not in self.ended:
            assert time.monotonic() < deadline, "the server left the call without an answer"
            if not self.read():
                return CLOSED
        headers = self.headers.get(stream, {})
        if headers.get(":status", "200") != "200":
            return headers[":status"]
        return headers.get("grpc-status", RESET)

    def read(self) -> bool:
        """Read once; return False if the server has closed the connection."""
        try:
            data = self.socket.recv(65536)
            events = self.http.receive_data(data)
        except (ConnectionError, h2.exceptions.ProtocolError):
            return False
        for event in events:
            if isinstance(event, h2.events.DataReceived):
                self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                self.headers.setdefault(event.stream_id, {}).update(event.headers)
            elif isinstance(event, h2.events.ConnectionTerminated):
                self.gone = True
            elif isinstance(event, _ENDS):
                self.ended[event.stream_id] = type(event).__name__
        try:
            self.flush()
        except ConnectionError:
            return False
        return bool(data)
