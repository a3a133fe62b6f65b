"""Memory that was freed, back to the system: glibc keeps it for itself, and a model that was unloaded is large."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Have the C library give back what it can. Takes milliseconds; does nothing where the library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
