"""Where training and evaluation run: the device, the precision, the threads, and the note of them in a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaeserve_training.config import ConfigError, RunConfig


def choose_device(requested: str) -> torch.device:
    """Return the device for auto, cuda or cpu. `auto` takes CUDA where it works; ConfigError if cuda does not."""
    if requested == "cpu":
        return torch.device("cpu")
    reason = _cuda_failure()
    if reason is None:
        return torch.device("cuda")
    if requested == "cuda":
        raise ConfigError(f"the device is cuda, but it does not work here: {reason}; use auto or cpu")
    return torch.device("cpu")


def _cuda_failure() -> str | None:
    """Return why CUDA cannot be used, None if it can. A device that is listed may still fail, so one sum is tried."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device" if torch.version.cuda else "this PyTorch was built without CUDA"
    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the context the networks run in: bf16 where asked for, or by `auto` on a GPU that computes in it."""
    automatic = config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=automatic or config.precision == "bf16")


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Return the array as a tensor that shares its memory; a copy if it is read-only, which tensors cannot be."""
    return torch.from_numpy(images if images.flags.writeable else images.copy())


def place(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """Return the uint8 images as a tensor on the device, or in main memory if they would fill half of a GPU's rest."""
    tensor = as_tensor(images)
    if device.type == "cuda" and tensor.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return tensor
    return tensor.to(device)


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Compute with so many CPU threads; None leaves PyTorch's own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return what bit-identical results depend on beside the configuration and the data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "device": f"{device.type} {name}",
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
