"""What our control groups (version 2) grant us of the machine: memory and processor time.

Services have limits by ``MemoryMax=`` and ``CPUQuota=``, containers by ``--memory`` and ``--cpus``. Of the older
version 1 nothing is read. Files and their meaning: the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_RECLAIMABLE = frozenset({"active_file", "inactive_file", "slab_reclaimable"})


def own_group(membership: Path = _MEMBERSHIP) -> str:
    """Our path in the unified hierarchy, the line that starts with ``0::``; empty where there is none."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:] for line in lines if line.startswith("0::")), "")


def memory_left_bytes(group: str, root: Path = _ROOT) -> int:
    """The smallest distance to a ``memory.max`` from ``group`` up to the root; huge without limits.

    What the kernel gives back by itself counts as left, as in MemAvailable: cached files, model files just written
    among them, are charged to whoever brought them in.
    """
    left = 1 << 62
    for level in _levels(group, root):
        limit, current = _read_number(level / "memory.max"), _read_number(level / "memory.current")
        if limit is not None and current is not None:
            left = min(left, max(0, limit - current + min(current, _reclaimable_bytes(level))))
    return left


def processor_quota(group: str, root: Path = _ROOT) -> float:
    """Seconds of processor time in a second, by the smallest ``cpu.max`` up to the root; infinite without one."""
    return min((_read_quota(level / "cpu.max") for level in _levels(group, root)), default=math.inf)


def _levels(group: str, root: Path) -> Iterator[Path]:
    path = root / group.strip("/")
    for level in (path, *path.parents):
        if not level.is_relative_to(root):
            return
        yield level


def _reclaimable_bytes(level: Path) -> int:
    pairs = (line.partition(" ") for line in _read(level / "memory.stat").splitlines())
    return sum(int(value) for key, _, value in pairs if key in _RECLAIMABLE and value.isdigit())


def _read_number(file: Path) -> int | None:
    """None for "max", and where the file does not exist."""
    text = _read(file)
    return int(text) if text.isdigit() else None


def _read_quota(file: Path) -> float:
    """Of ``cpu.max``: what may be used in each period, "max" without limit, and the period, in microseconds."""
    match _read(file).split():
        case [quota, period] if quota.isdigit() and period.isdigit() and int(period):
            return int(quota) / int(period)
    return math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
