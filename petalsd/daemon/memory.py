"""How much memory the device has for us now: the machine's, the control group's, or the GPU's."""

from __future__ import annotations

from pathlib import Path

import torch

from petalsd.control_groups import memory_left_bytes, own_group
from petalsd.ops.memory import free_gpu_bytes

_MEMINFO = Path("/proc/meminfo")


def device_memory_bytes(device: torch.device) -> int:
    """What is available now: on a CPU bounded by our control groups, on a GPU with what this process holds.

    Others, a desktop among them, may have a part of a GPU, and so has the driver for each process.
    """
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device)
    return min(available_bytes(_MEMINFO), memory_left_bytes(own_group()))


def free_memory_bytes(device: torch.device) -> int:
    """What can be taken now, beside all that we have taken already."""
    return free_gpu_bytes(device) if device.type == "cuda" else device_memory_bytes(device)


def available_bytes(meminfo: Path) -> int:
    """MemAvailable of /proc/meminfo: what can be taken without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable")
