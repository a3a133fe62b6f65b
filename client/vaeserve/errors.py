"""Everything the SDK raises, and the one place where a gRPC status becomes an exception.

    VaeserveError
    ├── InvalidArgument     (ValueError)       the request can never succeed: shape, dtype, values, number of rows
    ├── NotFound            (LookupError)      no such model or version
    ├── FailedPrecondition                     another model is served than the one asked for; no fitted prior
    ├── ResourceExhausted                      the server's queue is full; `retry_after_s` may say for how long
    ├── DeadlineExceeded    (TimeoutError)     no answer within the call's `timeout_s`
    ├── Unavailable         (ConnectionError)  no server there, or it is loading or draining
    ├── Unauthenticated                        no credentials, or wrong ones
    ├── PermissionDenied                       the credentials are not enough
    ├── Unimplemented                          something answers there, but not this service
    ├── Cancelled                              the call was cancelled, or the client closed under it
    ├── Internal                               a fault of the server; its log has more under `call_id`
    ├── UnknownError                           any other status
    └── ClientClosed                           the client was used after close()

What the SDK can see is wrong it raises as InvalidArgument before anything is sent, in the words of the server.
"""

# ruff: noqa: N818  the names are those of gRPC's status codes

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_STATUS_DETAILS_KEY = "grpc-status-details-bin"
# How gRPC's core words a connection that could not be made or did not live, the most telling wording first.
_CONNECTION_TROUBLE = (
    r"Connection refused",
    r"Domain name not found",
    r"CERTIFICATE_VERIFY_FAILED",
    r"[Hh]andshake failed",
    r"Connection reset[^;]*",
    r"Socket closed|End of TCP stream",
    r"(?:errors resolving|DNS resolution failed|[Ff]ailed to connect)[^;]*",
)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong: its path in the request message, and what is wrong with it."""

    field: str
    description: str


class VaeserveError(Exception):
    """Base of everything the SDK raises on purpose.

    Attributes:
        message: what went wrong, in words for a person; also `str(error)`.
        code: the gRPC status code's name, such as "INVALID_ARGUMENT".
        violations: the fields that are wrong, for InvalidArgument.
        reason: the error in one machine-readable word, such as "DIGEST_MISMATCH", where the server gave one.
        model: "name/version" of the model concerned, where known.
        call_id: the id under which the server logged the call, where known.
        retry_after_s: how long the server asks to wait before another attempt, in seconds, where it says.
    """

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        violations: Iterable[FieldViolation] = (),
        reason: str | None = None,
        model: str | None = None,
        call_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.violations = tuple(violations)
        self.reason = reason
        self.model = model
        self.call_id = call_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls the class with `args` alone and OSError's adds errno; this keeps every attribute.
        return _rebuild, (type(self), self.message, self.__dict__.copy())


def _rebuild(kind: type[VaeserveError], message: str, attributes: dict[str, Any]) -> VaeserveError:
    error = kind(message)
    error.__dict__.update(attributes)
    return error


class InvalidArgument(VaeserveError, ValueError):
    """The request can never succeed: shape, dtype, values or number of rows."""

    code = "INVALID_ARGUMENT"


class NotFound(VaeserveError, LookupError):
    """No such model or version."""

    code = "NOT_FOUND"


class FailedPrecondition(VaeserveError):
    """Another model is served than the one asked for, or the model has no fitted prior."""

    code = "FAILED_PRECONDITION"


class ResourceExhausted(VaeserveError):
    """The server's queue is full, or a message is larger than a limit."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(VaeserveError, TimeoutError):
    """No answer within the call's `timeout_s`."""

    code = "DEADLINE_EXCEEDED"


class Unavailable(VaeserveError, ConnectionError):
    """No server there, or it is loading or draining."""

    code = "UNAVAILABLE"


class Unauthenticated(VaeserveError):
    """No credentials, or wrong ones."""

    code = "UNAUTHENTICATED"


class PermissionDenied(VaeserveError):
    """The credentials are not enough."""

    code = "PERMISSION_DENIED"


class Unimplemented(VaeserveError):
    """Something answers there, but not this service."""

    code = "UNIMPLEMENTED"


class Cancelled(VaeserveError):
    """The call was cancelled, or the client closed under it."""

    code = "CANCELLED"


class Internal(VaeserveError):
    """A fault of the server; its log has more under `call_id`."""

    code = "INTERNAL"


class UnknownError(VaeserveError):
    """Any other status."""


class ClientClosed(VaeserveError):
    """The client was used after close()."""

    code = "CANCELLED"


_KINDS: dict[str, type[VaeserveError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        NotFound,
        FailedPrecondition,
        ResourceExhausted,
        DeadlineExceeded,
        Unavailable,
        Unauthenticated,
        PermissionDenied,
        Unimplemented,
        Cancelled,
        Internal,
    )
}


class StatusLike(Protocol):
    """What grpc.RpcError and grpc.aio.AioRpcError have in common; this module needs no grpc."""

    def code(self) -> Any: ...  # noqa: D102
    def details(self) -> str | None: ...  # noqa: D102
    def trailing_metadata(self) -> Any: ...  # noqa: D102


def invalid(field: str, description: str, *, model: str | None = None) -> InvalidArgument:
    """Return the InvalidArgument of one wrong field."""
    return InvalidArgument(description, violations=[FieldViolation(field, description)], model=model)


def count_rows_from(error: VaeserveError, first_row: int) -> VaeserveError:
    """Return the error of one call of many with the rows that it names counted from the first row of the whole."""
    if first_row and isinstance(error, InvalidArgument):
        error.message = _shift_row(error.message, first_row)
        error.args = (error.message,)
        error.violations = tuple(
            FieldViolation(each.field, _shift_row(each.description, first_row)) for each in error.violations
        )
    return error


def _shift_row(words: str, first_row: int) -> str:
    return re.sub(r"\brow (\d+) has\b", lambda found: f"row {int(found[1]) + first_row} has", words)


def from_status(status: StatusLike, *, target: str, timeout_s: float | None) -> VaeserveError:
    """Return the exception that stands for a gRPC status; `target` and `timeout_s` help the words."""
    code = status.code().name
    kind = _KINDS.get(code, UnknownError)
    details = _read_details(status)
    message = status.details() or code
    if kind is UnknownError:
        message = f"{code}: {message}"
    elif not details:  # the server's own errors carry details; one without may be this side's transport speaking
        message = _explain_local(kind, message, target=target, timeout_s=timeout_s)
    error = kind(message, **details)
    error.code = code
    return error


def _explain_local(kind: type[VaeserveError], message: str, *, target: str, timeout_s: float | None) -> str:
    """Turn what gRPC's transport says when there was no answer into what its reader can do about it."""
    if kind is Unavailable:
        causes = (re.search(pattern, message) for pattern in _CONNECTION_TROUBLE)
        if cause := next(filter(None, causes), None):
            return (
                f"no vaeserve server can be reached at {target} ({cause[0].strip(' .')[:160]}); check that it runs, "
                "the host and port, that both sides use TLS or neither does, and the client's certificate if the "
                "server wants one"
            )
    if kind is DeadlineExceeded and message == "Deadline Exceeded":
        return no_answer(target, timeout_s).message
    return message


def no_answer(target: str, timeout_s: float | None) -> DeadlineExceeded:
    """Return the error of a call that this side stopped waiting for."""
    within = "the deadline" if timeout_s is None else f"{timeout_s:g} s"
    return DeadlineExceeded(f"no answer from {target} within {within}; give the call more time with timeout_s")


def _read_details(status: StatusLike) -> dict[str, Any]:
    """Return the google.rpc details of a status as keyword arguments of VaeserveError."""
    packed = next((value for key, value in status.trailing_metadata() or () if key == _STATUS_DETAILS_KEY), None)
    try:
        return {} if packed is None else _unpack(status_pb2.Status.FromString(packed))
    except DecodeError:  # not google.rpc's: the code and the message still stand
        return {}


def _unpack(rich: status_pb2.Status) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for detail in rich.details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            found["violations"] = [FieldViolation(each.field, each.description) for each in bad.field_violations]
        elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            found["reason"] = info.reason or None
            found["model"] = info.metadata.get("model")
            found["call_id"] = info.metadata.get("call_id")
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            found["retry_after_s"] = delay.seconds + delay.nanos * 1e-9
    return found
