"""Exception -> status, once for every transport: gRPC's codes by their book, with google.rpc details."""

from __future__ import annotations

from dataclasses import dataclass, replace

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from vaeserve_server import errors

_DOMAIN = "vaeserve"
_CODES = {
    errors.InvalidInputError: code_pb2.INVALID_ARGUMENT,
    errors.NotFoundError: code_pb2.NOT_FOUND,
    errors.PreconditionError: code_pb2.FAILED_PRECONDITION,
    errors.NotOfferedError: code_pb2.UNIMPLEMENTED,
    errors.QueueFullError: code_pb2.RESOURCE_EXHAUSTED,
    errors.DeadlineError: code_pb2.DEADLINE_EXCEEDED,
    errors.NotServingError: code_pb2.UNAVAILABLE,
    errors.UnauthenticatedError: code_pb2.UNAUTHENTICATED,
    errors.NotAllowedError: code_pb2.PERMISSION_DENIED,
}


@dataclass(frozen=True)
class Status:
    """How a call failed: `code` is google.rpc.Code's, `metadata` goes into the trailers (-bin keys have bytes)."""

    code: int
    message: str
    metadata: tuple[tuple[str, str | bytes], ...]

    def with_metadata(self, more: tuple[tuple[str, str | bytes], ...]) -> Status:
        """Return the status with `more` in its metadata."""
        return replace(self, metadata=(*self.metadata, *more))


def of_error(error: errors.CallError) -> Status:
    """Return the status of what a caller is told in full."""
    code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata=error.metadata),
    ]
    pushback: tuple[tuple[str, str], ...] = ()
    if isinstance(error, errors.InvalidInputError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(error, errors.QueueFullError):
        pushback_ms = -1 if error.retry_after_s is None else max(1, round(error.retry_after_s * 1000))
        pushback = (("grpc-retry-pushback-ms", str(pushback_ms)),)
        if pushback_ms > 0:
            delay = Duration()
            delay.FromMilliseconds(pushback_ms)
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _status(code, str(error), details, pushback)


def of_fault(call_id: str) -> Status:
    """Return the status of a fault of the server: nothing but the id under which the log has it."""
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=_DOMAIN, metadata={"call_id": call_id})
    return _status(code_pb2.INTERNAL, f"the server failed; its log has the details under call id {call_id}", [info])


def _status(code: int, message: str, details: list[Message], metadata: tuple[tuple[str, str], ...] = ()) -> Status:
    rich = status_pb2.Status(code=code, message=message)
    for detail in details:
        rich.details.add().Pack(detail)
    return Status(code, message, (("grpc-status-details-bin", rich.SerializeToString()), *metadata))
