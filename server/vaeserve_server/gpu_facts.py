"""What this machine has of a GPU, asked of the driver and the libraries themselves: nvidia-smi need not be there."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

from vaeserve_server import pinned

_NAME_BYTES = 100
_CUDNN = "libcudnn.so.9"


class Driver(NamedTuple):
    """The NVIDIA driver: the newest CUDA that it can run, `major.minor`, and its GPUs by name and memory."""

    cuda_version: str
    gpus: list[str]


class Library(NamedTuple):
    """A library that ONNX Runtime's CUDA provider needs: its version, or why it does not load."""

    name: str
    version: str
    problem: str


def driver() -> Driver | str:
    """Return the driver, or in words why there is none that works."""
    try:
        library = pinned.driver()
    except OSError:
        return "none, or none that this container may use"
    code = library.cuInit(0)
    if code:
        return f"installed, but it gives no GPU (cuInit returns {code})"
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return Driver(_cuda_version(version.value), list(_gpus(library)))


def libraries(cuda_version: str) -> list[Library]:
    """Return the libraries that an ONNX Runtime built for CUDA `cuda_version` loads, in the order it needs them."""
    major = cuda_version.partition(".")[0]
    return [
        _library(f"libcudart.so.{major}", "cudaRuntimeGetVersion"),
        _library(f"libcublasLt.so.{major}", ""),
        _library(f"libcublas.so.{major}", ""),
        _library(_CUDNN, "cudnnGetVersion"),
    ]


def _gpus(library: ctypes.CDLL) -> Iterator[str]:
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        device = ctypes.c_int()
        library.cuDeviceGet(ctypes.byref(device), index)
        name = ctypes.create_string_buffer(_NAME_BYTES)
        library.cuDeviceGetName(name, _NAME_BYTES, device)
        memory_bytes = ctypes.c_size_t()
        library.cuDeviceTotalMem_v2(ctypes.byref(memory_bytes), device)
        yield f"{name.value.decode()}, {memory_bytes.value / 2**30:.0f} GiB"


def _library(name: str, version_function: str) -> Library:
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        return Library(name, "", str(error))
    if version_function == "cudnnGetVersion":
        library.cudnnGetVersion.restype = ctypes.c_size_t
        cudnn = int(library.cudnnGetVersion())
        return Library(name, f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}", "")
    if version_function == "cudaRuntimeGetVersion":
        number = ctypes.c_int()
        library.cudaRuntimeGetVersion(ctypes.byref(number))
        return Library(name, _cuda_version(number.value), "")
    return Library(name, "loads", "")


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
