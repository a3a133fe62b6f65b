"""The Envoy around this interpreter, asked and told through its admin socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from vaeserve_server import envoy_tls, tls
from vaeserve_server.errors import ListenError
from vaeserve_server.tls import TlsFiles

_START_S = 20.0
_POLL_S = 0.01
_ADMIN_S = 5.0
_RENEW_S = 5.0
_FLUSH_S = 1.0
_MOST_PATH_BYTES = 107 if sys.platform == "linux" else 103  # what the address of a socket has room for
_UNHEARD = (OSError, ValueError, http.client.HTTPException)

_log = logging.getLogger(__name__)


def socket_path(folder: Path) -> Path:
    """Return where the socket is, in the folder that Envoy was given."""
    return folder / "admin.sock"


def check_path(folder: Path) -> None:
    """Raise OSError if the socket's path is too long to be one."""
    path = socket_path(folder)
    if len(os.fsencode(path)) > _MOST_PATH_BYTES:
        raise OSError(
            errno.ENAMETOOLONG, f"a socket's path has at most {_MOST_PATH_BYTES} bytes on this system", str(path)
        )


class Admin:
    """What is asked and told."""

    def __init__(self, folder: Path, files: TlsFiles | None = None) -> None:
        self._folder = folder
        self._socket = socket_path(folder)
        self._files = files
        self._generation = 0
        self._refused = 0

    async def wait_listening(self) -> int:
        """Wait until Envoy takes connections, and return its port; StartError if it does not come to it."""
        try:
            async with asyncio.timeout(_START_S):
                while not await self._is_live():  # noqa: ASYNC110 - nobody tells; it can only be asked
                    await asyncio.sleep(_POLL_S)
                listeners = json.loads(await self._ask("GET", "/listeners?format=json"))
        except TimeoutError:
            raise ListenError(f"Envoy did not start to listen within {_START_S:.0f} s") from None
        if self._files is not None:
            await self.renew_tls()  # whether it took the certificate, and what became of the files since it read them
        port: int = listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"]
        return port

    async def renew_tls(self) -> None:
        """Have Envoy show the certificate that is in the files now; TlsError if it does not take all of them."""
        files = self._files
        assert files is not None
        self._generation += 1
        serial = (await asyncio.to_thread(tls.read, files)).serial
        before = await self._taken()
        await asyncio.to_thread(envoy_tls.write_secrets, files, self._folder, self._generation)
        try:
            async with asyncio.timeout(_RENEW_S):
                while not await self._uses(serial, before):  # noqa: ASYNC110 - as above
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise envoy_tls.not_taken(files, await self._taken() & before) from None
        await asyncio.to_thread(envoy_tls.remove_links, self._folder, self._generation)

    async def stop_listening(self) -> None:
        """Refuse new connections, and ask open ones, with their next answer, to go away."""
        with _logged("send clients elsewhere"):
            await self._ask("POST", "/drain_listeners?graceful&skip_exit")  # GOAWAY; new connections may still come
            await self._ask("POST", "/drain_listeners")  # no new connections; by itself it would send no GOAWAY

    async def wait_flushed(self) -> None:
        """Wait until Envoy has handed every answer to the kernel, or its caller does not take it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                with _logged("wait for the last answers"):
                    while await self._active_streams():  # noqa: ASYNC110 - as above
                        await asyncio.sleep(_POLL_S)
                    return
                await asyncio.sleep(_FLUSH_S)  # as long as it may take, then

    def refused_calls(self) -> int:
        """Return how many calls Envoy refused by itself; as last known if it does not say. Not on the event loop."""
        with contextlib.suppress(*_UNHEARD):
            self._refused = int(self._ask_and_wait("GET", "/stats?filter=\\.rq_blocked$").rpartition(": ")[2])
        return self._refused

    async def quit(self) -> bool:
        """Let Envoy end; it tells the application so first. False if it cannot be told."""
        with _logged("end"):
            await self._ask("POST", "/quitquitquit")
            return True
        return False

    async def _is_live(self) -> bool:
        try:
            return "LIVE" in await self._ask("GET", "/ready")
        except OSError:
            return False

    async def _uses(self, serial: int, before: set[str]) -> bool:
        """Return whether all secrets were taken since `_taken` said `before`, and this certificate is shown."""
        return not await self._taken() & before and envoy_tls.shows(await self._ask("GET", "/certs"), serial)

    async def _taken(self) -> set[str]:
        """Return how often Envoy has taken each of its secrets, as it says so itself, a line each."""
        return set((await self._ask("GET", f"/stats?filter={envoy_tls.TAKEN}")).splitlines())

    async def _active_streams(self) -> int:
        return int((await self._ask("GET", "/stats?filter=http.grpc.downstream_rq_active$")).rpartition(": ")[2])

    async def _ask(self, method: str, path: str) -> str:
        return await asyncio.to_thread(self._ask_and_wait, method, path)

    def _ask_and_wait(self, method: str, path: str) -> str:
        with contextlib.closing(_UnixConnection(self._socket)) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read().decode()
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"Envoy answered {path} with {response.status}: {body.strip()}")
        return body


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log that Envoy cannot be asked to do it, and go on, as a drain must: who cleans up may take the socket away."""
    try:
        yield
    except _UNHEARD as error:
        _log.warning("Envoy cannot be asked to %s: %s", what, error)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket in the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_ADMIN_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
