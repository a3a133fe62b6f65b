"""How many cores this process may really use: the affinity mask and the cgroup's quota, never the machine's count.

One thread too many on a limited container is throttled by the kernel for tens of milliseconds at a time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of whole cores to use, at least 1. `root` is where proc and sys are looked up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, cgroup_quota(root))))


def cgroup_quota(root: Path) -> float:
    """Return the cores that the cgroup (version 1 or 2) and its parents allow; infinity without a limit."""
    mounts = root / "sys/fs/cgroup"
    quota = math.inf
    hybrid = mounts / "unified"  # where version 2 is mounted beside hierarchies of version 1
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one hierarchy
            mount = hybrid if hybrid.is_dir() else mounts
            quota = min(quota, *(_quota_v2(folder) for folder in _lineage(mount, path)))
        elif "cpu" in controllers.split(","):
            mount = mounts / controllers if (mounts / controllers).is_dir() else mounts / "cpu"
            quota = min(quota, *(_quota_v1(folder) for folder in _lineage(mount, path)))
    return quota


def _lineage(mount: Path, path: str) -> list[Path]:
    """Return the folders of a cgroup and its parents. In a container the mount itself is the process's cgroup."""
    cgroup = PurePosixPath(path.lstrip("/"))
    return [mount / cgroup, *(mount / parent for parent in cgroup.parents)]


def _quota_v2(folder: Path) -> float:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.strip().isdigit() else math.inf


def _quota_v1(folder: Path) -> float:
    quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf  # -1: no limit


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # not there, or not readable: no limit that we can know of
        return ""
