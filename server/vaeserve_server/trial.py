"""Trying a version in a process of its own: what ONNX Runtime dies of, or takes all memory for, kills that one.

A graph of honest operators can still abort ONNX Runtime (a convolution of scalars does), without any exception. With
`--try-first` such a version is refused like any other that is unsound. `trial_main` is what runs there.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys

from vaeserve_server.bundle import Bundle
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings

# A version has a few graphs, each warmed on a few sizes within --watchdog-s; what ONNX Runtime makes of a graph before
# it runs has no limit of its own.
_WATCHDOGS, _LEAST_S = 10, 60.0
_OF_ENVOY = {
    "LD_PRELOAD",
    "DYLD_INSERT_LIBRARIES",
    "PYTHONHOME",
}  # by which Envoy finds Python, and Python itself would not


def attempt(settings: Settings, bundle: Bundle) -> None:
    """Load and warm the bundle elsewhere, with these settings; StartError if that does not end well. Blocks."""
    label = f"{bundle.card.name}/{bundle.card.version}"
    limit_s = max(_LEAST_S, _WATCHDOGS * settings.watchdog_s) if settings.watchdog_s else None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vaeserve_server.trial_main", bundle.card.name, bundle.card.version],
            input=settings.model_dump_json(),
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name not in _OF_ENVOY},
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StartError(
            f"{label} cannot be loaded: the process that tried it did not end within {limit_s:g} s"
        ) from None
    except OSError as error:
        raise StartError(f"{label} cannot be tried: no process can be started ({error})") from None
    said = done.stdout.strip()
    if done.returncode == 1 and said:
        raise StartError(said)
    if done.returncode:
        raise StartError(f"{label} cannot be loaded: the process that tried it ended with {_words(done.returncode)}")
    if said != fingerprint(bundle):
        raise StartError(f"{label} changed while it was tried")


def fingerprint(bundle: Bundle) -> str:
    """Return what tells this bundle from any other: its card has the SHA-256 of each graph."""
    return hashlib.sha256(bundle.card.SerializeToString(deterministic=True)).hexdigest()


def _words(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
