"""The machine that figures come from, and whether it was quiet. Figures of two machines do not compare, ratios may."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import children
from vaeserve_server.cores import available_cores

_PACKAGES = ("vaeserve", "onnxruntime", "onnxruntime-gpu", "grpcio", "protobuf", "numpy", "uvloop", "pyvoy")


def describe() -> dict[str, Any]:
    """Return processor, cores, memory, GPU, and the versions of what takes part."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


class Watch:
    """How much of the processors others used since it was made."""

    def __init__(self) -> None:
        self._busy_s = _busy_s()
        self._own_s = children.cpu_s(os.getpid())
        self._began = time.perf_counter()

    def others_share(self) -> float | None:
        """Return the share of all cores that no process of this benchmark used; None where there is no /proc."""
        if self._busy_s is None:
            return None
        elapsed_s = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        others_s = (_busy_s() or 0.0) - self._busy_s - (children.cpu_s(os.getpid()) - self._own_s)
        return max(0.0, others_s / elapsed_s)


def _busy_s() -> float | None:
    """Return the processor time that the whole machine has spent on anything, the host's other guests included."""
    try:
        fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    except OSError:
        return None
    idle, waiting = fields[3], fields[4]
    return (sum(fields) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    return output or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
