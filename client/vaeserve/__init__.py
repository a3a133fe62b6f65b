"""vaeserve: encode images, decode latents and sample a variational autoencoder over gRPC.

    from vaeserve import Client

    with Client("127.0.0.1:50051") as client:
        codes = client.encode(images)             # uint8 (N, 28, 28) -> codes.mean, codes.stddev (N, 20)
        copies = client.decode(codes)             # float32 (N, 1, 28, 28) in 0..1
        fresh = client.sample(64, seed=7).images

Names are loaded when they are first used (PEP 562): the training side imports `vaeserve.v1` from here and must not pay
for, or depend on, grpc.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vaeserve._version import __version__

if TYPE_CHECKING:
    from vaeserve._results import Encoding, ModelInfo, ModelRef, Samples
    from vaeserve._settings import TLS
    from vaeserve.aio import AsyncClient
    from vaeserve.client import Client
    from vaeserve.errors import (
        Cancelled,
        ClientClosed,
        DeadlineExceeded,
        FailedPrecondition,
        FieldViolation,
        Internal,
        InvalidArgument,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        UnknownError,
        VaeserveError,
    )

_ERRORS = (
    "Cancelled",
    "ClientClosed",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FieldViolation",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownError",
    "VaeserveError",
)
_HOMES = {
    "TLS": "vaeserve._settings",
    "Encoding": "vaeserve._results",
    "ModelInfo": "vaeserve._results",
    "ModelRef": "vaeserve._results",
    "Samples": "vaeserve._results",
    "AsyncClient": "vaeserve.aio",
    "Client": "vaeserve.client",
    **dict.fromkeys(_ERRORS, "vaeserve.errors"),
}

__all__ = [
    "TLS",
    "AsyncClient",
    "Cancelled",
    "Client",
    "ClientClosed",
    "DeadlineExceeded",
    "Encoding",
    "FailedPrecondition",
    "FieldViolation",
    "Internal",
    "InvalidArgument",
    "ModelInfo",
    "ModelRef",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "Samples",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnknownError",
    "VaeserveError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
