"""Who may call which method: asked once for each call, before its message is read, whatever transport brought it."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar

from grpc_health.v1 import health_pb2

from vaeserve_server.errors import NotAllowedError, UnauthenticatedError, shown
from vaeserve_server.tokens import Tokens

AUTHORIZATION = "authorization"

caller: ContextVar[str] = ContextVar("caller", default="")
"""The name of the token that the call at hand came with; empty where none was asked for."""

_HEALTH = f"{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"
_OIP_HEALTH = {"inference.GRPCInferenceService/ServerLive", "inference.GRPCInferenceService/ServerReady"}
_SCHEME = "bearer "


class Access:
    """What is let in. Without `tokens` everything is; with them, methods that nobody knows are closed as well."""

    def __init__(self, tokens: Tokens | None = None, *, open_health: bool = True) -> None:
        self.tokens = tokens
        self._open_health = open_health

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Let a call of "package.Service/Method" with this metadata pass.

        UnauthenticatedError, in the same words for no token and for any that is not valid, or NotAllowedError.
        """
        if self.tokens is None or (self._open_health and (method.startswith(_HEALTH) or method in _OIP_HEALTH)):
            return
        given = [value for key, value in metadata or () if key == AUTHORIZATION]
        token = self.tokens.find(_bearer(given[0])) if len(given) == 1 else None
        if token is None:
            raise UnauthenticatedError("no valid token came with the call; send `authorization: Bearer TOKEN`")
        if not token.allows(method):
            raise NotAllowedError(f"the token {token.name} is not for {shown(method)}")
        caller.set(token.name)


def _bearer(value: str | bytes) -> str:
    """Return the token of an authorization header, empty if it has none."""
    text = value if isinstance(value, str) else ""
    return text[len(_SCHEME) :].strip() if text[: len(_SCHEME)].lower() == _SCHEME else ""
