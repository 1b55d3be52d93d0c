"""How much memory the device has for us now: the machine's, the control group's, or the GPU's."""

from __future__ import annotations

from pathlib import Path

import torch

from petalsd.ops.memory import free_gpu_bytes

_MEMINFO = Path("/proc/meminfo")
_CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def device_memory_bytes(device: torch.device) -> int:
    """What is available now: on a CPU bounded by our control groups, on a GPU with what this process holds.

    Others, a desktop among them, may have a part of a GPU, and so has the driver for each process.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device)
    own_group = _cgroup_of_self(_CGROUP_MEMBERSHIP)
    return min(available_bytes(_MEMINFO), cgroup_left_bytes(_CGROUP_ROOT, own_group))


def free_memory_bytes(device: torch.device) -> int:
    """What can be taken now, beside all that we have taken already."""
    return free_gpu_bytes(device) if device.type == "cuda" else device_memory_bytes(device)


def available_bytes(meminfo: Path) -> int:
    """MemAvailable of /proc/meminfo: what can be taken without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable")


def cgroup_left_bytes(root: Path, group: str) -> int:
    """The smallest distance to a memory.max from ``group`` up to the root (cgroup v2); huge without limits."""
    left = 1 << 62
    path = root / group.strip("/")
    for level in (path, *path.parents):
        if not level.is_relative_to(root):
            break
        limit, current = _read_bytes(level / "memory.max"), _read_bytes(level / "memory.current")
        if limit is not None and current is not None:
            left = min(left, max(0, limit - current))
    return left


def _cgroup_of_self(membership: Path) -> str:
    """The path in the unified hierarchy, the line that starts with ``0::``."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:] for line in lines if line.startswith("0::")), "")


def _read_bytes(file: Path) -> int | None:
    """None for "max", and where the file does not exist."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
