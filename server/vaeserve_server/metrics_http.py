"""GET /metrics: the smallest HTTP server that Prometheus can scrape, in threads of its own.

A scrape never waits for the event loop, nor the loop for a scrape, so a server that is too busy to answer calls can
still be looked at. Scrapes are bounded in number and time: each holds a thread and a file, which calls need, too.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Thread, Timer
from typing import Any

from vaeserve_server.addresses import address
from vaeserve_server.errors import ListenError

PATH = "/metrics"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SLOWEST_S = 5.0  # from the connection to the end of the answer
_MOST_AT_ONCE = 32
_POLL_S = 0.05

_log = logging.getLogger(__name__)


class MetricsEndpoint:
    """Listens from the start until `close`. `port` is the one listened on, `url` what to give to Prometheus."""

    def __init__(self, host: str, port: int, text: Callable[[], bytes]) -> None:
        """Serve what `text` returns, in Prometheus' text format; it is called in a thread for each scrape.

        `port` 0 takes a free one. ListenError if the address cannot be had.
        """
        try:
            self._server = _HttpServer(host, port, text)
        except OSError as error:
            raise ListenError(
                f"cannot listen on {address(host, port)} for metrics: {error.strerror or error}; choose another "
                "--metrics-host or --metrics-port, or --no-metrics"
            ) from None
        self.port: int = self._server.server_address[1]
        self.url = f"http://{address(host, self.port)}{PATH}"
        self._thread = Thread(target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; scrapes that are on may end. Waits for a thread, so call it off the event loop."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _HttpServer(ThreadingHTTPServer):
    allow_reuse_port = False
    block_on_close = False
    request_queue_size = _MOST_AT_ONCE

    def __init__(self, host: str, port: int, text: Callable[[], bytes]) -> None:
        self.text = text
        self._places = BoundedSemaphore(_MOST_AT_ONCE)
        self.address_family, _, _, _, bound = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        super().__init__(bound, _Handler)  # type: ignore[arg-type]  # an IPv6 address has four parts

    def server_bind(self) -> None:
        """Bind without the look-up of this machine's name that HTTPServer does, which can take seconds."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection, or close it if too many are open."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer on a connection, and see that it comes to an end."""
        breaker = Timer(_SLOWEST_S, _cut, [request])
        breaker.daemon = True
        breaker.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            breaker.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong, unless it is that the caller has gone."""
        if not isinstance(sys.exception(), OSError):
            _log.exception("the metrics cannot be told")


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    server_version = "vaeserve"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer a scrape."""
        if self.path.partition("?")[0] != PATH:
            self.send_error(HTTPStatus.NOT_FOUND, explain=f"the metrics are at {PATH}")
            return
        body = self.server.text()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: scrapes come every few seconds."""
