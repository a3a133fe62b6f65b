"""A server's certificate and its callers' tokens: read before it listens, and read again when their files change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vaeserve_server import tokens
from vaeserve_server.access import Access
from vaeserve_server.renewal import Renewal
from vaeserve_server.settings import Settings, is_loopback
from vaeserve_server.tls import Tls, TlsFiles

_log = logging.getLogger(__name__)


def tls_files(settings: Settings) -> TlsFiles | None:
    """Return the files of TLS; None where nothing is encrypted."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return TlsFiles(settings.tls_cert, settings.tls_key, settings.client_ca)


class Credentials:
    """`tls` is None where nothing is encrypted. `load` once, then `watch`, then `close`."""

    def __init__(self, settings: Settings) -> None:
        files = tls_files(settings)
        self._settings = settings
        self._tokens = tokens.Tokens(settings.tokens) if settings.tokens else None
        self._renewals: list[Renewal] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.tls = Tls(files) if files else None
        self.access = Access(self._tokens, open_health=settings.open_health)

    async def load(self) -> None:
        """Read all there is; StartError if a file cannot be used."""
        if self._tokens:
            self._renewals.append(Renewal("the file of tokens", [self._tokens.path], self._read_tokens))
            await self._read_tokens()
        if self.tls:
            self._renewals.append(Renewal("the certificate", self.tls.files.all(), self._read_tls))
            await asyncio.to_thread(self.tls.load)

    def watch(self, renew_tls: Callable[[], Awaitable[None]]) -> None:
        """Read again what changes, from now on. `renew_tls` is called when there is another certificate."""
        self._renew_tls = renew_tls
        self._tasks = [asyncio.create_task(renewal.watch()) for renewal in self._renewals]

    def close(self) -> None:
        """Stop watching."""
        for task in self._tasks:
            task.cancel()

    async def _read_tokens(self) -> None:
        assert self._tokens is not None
        self._tokens.use(await asyncio.to_thread(tokens.read, self._tokens.path))

    async def _read_tls(self) -> None:
        assert self.tls is not None
        await asyncio.to_thread(self.tls.load)
        await self._renew_tls()

    def say_who_may_call(self) -> None:
        """Log it, as a warning if that is anybody on a network."""
        asks_certificates = bool(self.tls and self.tls.files.client_ca)
        fields = {
            "encrypted": self.tls is not None,
            "client_certificates": asks_certificates,
            "tokens": len(self._tokens.tokens) if self._tokens else "none asked for",
        }
        open_to_all = not (self._tokens or asks_certificates or is_loopback(self._settings.host))
        level = logging.WARNING if open_to_all else logging.INFO
        words = "whoever reaches the address may call" if open_to_all else "who may call"
        _log.log(level, words, extra={"fields": fields})
