"""The settings and the memory that both clients have: everything about a Client that neither waits nor sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaeserve import _calls, _settings, _token
from vaeserve._results import Array, ModelInfo, ModelLike, ModelRef
from vaeserve.errors import (
    ClientClosed,
    DeadlineExceeded,
    NotFound,
    StatusLike,
    Unavailable,
    VaeserveError,
    from_status,
    invalid,
)


class ClientBase(ABC):
    """Settings, model cards and the cutting of rows into calls."""

    def __init__(
        self,
        target: str = _settings.DEFAULT_TARGET,
        *,
        model: ModelLike = None,
        timeout_s: float = _settings.DEFAULT_TIMEOUT_S,
        rows_per_call: int | None = None,
        calls_in_flight: int = _calls.DEFAULT_CALLS_IN_FLIGHT,
        max_attempts: int = _settings.MAX_ATTEMPTS,
        tls: _settings.TLS | bool = False,
        token: str | Path | None = None,
        insecure: bool = False,
        metadata: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]] = (),
        connections: int = 1,
        max_message_bytes: int = _settings.MAX_MESSAGE_BYTES,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Set up a client; it connects when it is first used.

        Args:
            target: "host:port", or any gRPC target. "ipv4:10.0.0.1:50051,10.0.0.2:50051" takes its servers in turn, and
                goes on with the others when one goes away; for a DNS name of several servers that is
                `channel_options=[("grpc.lb_policy_name", "round_robin")]`.
            model: which model to use where a verb names none: "name", "name/version" or a ModelRef. None is the only
                model served, in its highest version.
            timeout_s: the deadline of each call, retries included; verbs take their own. A bulk verb makes many calls.
            rows_per_call: most rows in one call; None is a few hundred, fewer for large images. The server's own
                limit holds anyway.
            calls_in_flight: how many calls a bulk verb keeps under way, and so how many it holds in memory.
            max_attempts: how often a call is tried while the server is unavailable or full: 1 (once) to 5.
            tls: False for none, True for the public authorities, or a TLS value.
            token: shown to the server with each call, as `authorization: Bearer ...`; a Path is a file that holds it,
                read again when it changes. None takes VAESERVE_TOKEN, else the file VAESERVE_TOKEN_FILE, of the
                environment; "" is none.
            insecure: send the token to another machine although the connection is not encrypted.
            metadata: further gRPC metadata to send with each call.
            connections: how many connections to spread the calls over.
            max_message_bytes: the largest message to send or receive.
            channel_options: further gRPC channel arguments; they win over the SDK's own.
        """
        if rows_per_call is not None and rows_per_call < 1:
            raise invalid("rows_per_call", f"rows_per_call is {rows_per_call}; give 1 or more")
        if calls_in_flight < 1:
            raise invalid("calls_in_flight", f"calls_in_flight is {calls_in_flight}; give 1 or more")
        self._settings = _settings.ChannelSettings(
            target=target,
            tls=_settings.TLS() if tls is True else tls or None,
            max_attempts=max_attempts,
            connections=connections,
            max_message_bytes=max_message_bytes,
            options=tuple(channel_options),
        )
        self._model = ModelRef.of(model)
        self._timeout_s = _settings.check_timeout(timeout_s)
        self._rows_per_call = rows_per_call
        self._calls_in_flight = calls_in_flight
        self._extra_metadata = _settings.call_metadata(metadata)
        self._token = _token.find(token)
        if self._token is not None:
            self._token.check_connection(
                encrypted=bool(tls), local=_settings.is_local(target), insecure=insecure, target=target
            )
        self._cards: dict[ModelRef, ModelInfo] = {}
        self._closed = False
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Make ready to connect; the clients differ in how."""

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._settings.target

    @property
    def _metadata(self) -> _settings.Metadata:
        """What every call carries."""
        if self._token is None:
            return self._extra_metadata
        return (("authorization", self._token.header()), *self._extra_metadata)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"

    def _ref(self, model: ModelLike, given: object = None) -> ModelRef:
        """Return which model to ask: the verb's, else the client's; made exact where Encodings say whose they are."""
        ref = self._model if model is None else ModelRef.of(model)
        return ref if given is None else _calls.bind(ref, given)

    def _deadline_s(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else _settings.check_timeout(timeout_s)

    def _rows(self, operation: _calls.Operation[Any], info: ModelInfo, array: Array | None) -> int:
        return _calls.rows_per_call(
            operation, info, array, wanted=self._rows_per_call, max_message_bytes=self._settings.max_message_bytes
        )

    def _remember(self, ref: ModelRef, info: ModelInfo) -> ModelInfo:
        self._cards[ref] = self._cards[info.ref] = info
        return info

    def _failure(self, status: StatusLike, timeout_s: float | None) -> VaeserveError:
        return from_status(status, target=self.target, timeout_s=timeout_s)

    def _unhealthy(self, error: Exception) -> bool:
        """Return False for an error that means "not now"; raise any other."""
        if isinstance(error, (Unavailable, DeadlineExceeded, NotFound)):
            return False
        raise error from None

    def _not_ready(self, timeout_s: float, heard: str) -> DeadlineExceeded:
        last = f"it last said {heard}" if heard else "nothing answered there"
        return DeadlineExceeded(f"the server at {self.target} was not ready within {timeout_s:g} s; {last}")

    def _closed_error(self) -> ClientClosed:
        return ClientClosed(f"this client of {self.target} is closed; make a new one")
