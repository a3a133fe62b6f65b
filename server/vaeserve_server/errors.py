"""What can go wrong, in the server's own words and no transport's.

`status.py` turns a CallError into a status once, for every transport. A StartError never reaches a caller: it ends the
process with one line.
"""

from __future__ import annotations

from typing import ClassVar

_SHOWN_CHARACTERS = 64


def shown(text: str) -> str:
    """Return a caller's text as an error may repeat it: quoted, unprintables escaped, at most 64 characters of it."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")


class StartError(Exception):
    """The server cannot start. The message is one line that says what to do about it."""


class BundleError(StartError):
    """A bundle is missing, damaged, or not what its card says. `path` is the file or folder at fault."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class NoModelsError(StartError):
    """There is nothing to serve yet."""


class DeviceError(StartError):
    """The device asked for cannot run the graphs."""


class ListenError(StartError):
    """The address cannot be listened on."""


class TlsError(StartError):
    """A file of TLS is missing, damaged, or does not go with the others. `flag` is the option that names it."""

    def __init__(self, flag: str, path: object, problem: str) -> None:
        super().__init__(f"{flag} {path}: {problem}")


class TokensError(StartError):
    """The file of tokens is missing or damaged. The message never holds what stands in it."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"--tokens {path}: {problem}")


class GraphLoadError(Exception):
    """ONNX Runtime does not take a graph."""


class GraphRunError(Exception):
    """ONNX Runtime failed to run a graph, or the graph's answer is unusable."""


class CallError(Exception):
    """A call that cannot be answered; the message is for the caller. `reason` and `metadata` are for its program."""

    reason: ClassVar[str]

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.metadata = metadata


class InvalidInputError(CallError):
    """The request can never succeed. `field` is the path of the field at fault, as in `images.shape`."""

    reason = "INVALID_INPUT"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(description)
        self.field = field


class NotFoundError(CallError):
    """No such model or version is served."""

    reason = "MODEL_NOT_FOUND"


class PreconditionError(CallError):
    """The request does not go with the model that is served."""


class DigestMismatchError(PreconditionError):
    """The caller holds another model's digest, so its latents mean nothing here."""

    reason = "DIGEST_MISMATCH"


class NoFittedPriorError(PreconditionError):
    """The model was published without a fitted prior."""

    reason = "NO_FITTED_PRIOR"


class NotOfferedError(CallError):
    """The protocol has it, this server does not."""

    reason = "NOT_OFFERED"


class QueueFullError(CallError):
    """The call would overfill the queue. `retry_after_s` is None where trying again is useless."""

    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(CallError):
    """The caller's deadline passed before its rows were run."""

    reason = "DEADLINE_PASSED"


class NotServingError(CallError):
    """The server is loading or draining; the same call may succeed later or elsewhere."""

    reason = "NOT_SERVING"


class UnauthenticatedError(CallError):
    """The caller sent no token, or none that is valid; which of them it is told nobody."""

    reason = "NO_VALID_TOKEN"


class NotAllowedError(CallError):
    """The caller's token is valid, and not for this method."""

    reason = "RPC_NOT_ALLOWED"
