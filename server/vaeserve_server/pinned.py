"""Page-locked host memory: a GPU fetches it directly, at about twice the rate of memory that the driver must stage."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import weakref

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger(__name__)
_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: page-locked for every context


def driver() -> ctypes.CDLL:
    """Return the NVIDIA driver's library; OSError if there is none."""
    return ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")


def page_locked(shape: tuple[int, ...], library: ctypes.CDLL) -> NDArray[np.float32]:
    """Return a float32 array of zeros in page-locked memory; where the driver refuses, in ordinary memory.

    The calling thread must have a current CUDA context. The array may end in any thread.
    """
    array = np.zeros(shape, np.float32)
    address = ctypes.c_void_p(array.ctypes.data)
    context = ctypes.c_void_p()
    code = library.cuCtxGetCurrent(ctypes.byref(context)) or library.cuMemHostRegister_v2(
        address, ctypes.c_size_t(array.nbytes), ctypes.c_uint(_PORTABLE)
    )
    if code:  # a limit on locked memory, for instance: slower, and just as right
        _log.warning("no page-locked memory for a batch", extra={"fields": {"bytes": array.nbytes, "cuda_error": code}})
    else:
        weakref.finalize(array, _release, library, address, context).atexit = False
    return array


def _release(library: ctypes.CDLL, address: ctypes.c_void_p, context: ctypes.c_void_p) -> None:
    code = library.cuCtxPushCurrent_v2(context)
    if not code:
        code = library.cuMemHostUnregister(address)
        library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    if code:
        _warn_of_locked_memory(code)


@functools.cache  # once for each error
def _warn_of_locked_memory(code: int) -> None:
    _log.warning("page-locked memory is not given back", extra={"fields": {"cuda_error": code}})
