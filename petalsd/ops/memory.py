"""Memory for tensors that are read whole at every step: weights, and keys and values."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

_CACHE_LINE = 64
_HUGE_PAGE = 2 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As ``torch.empty``; on a CPU in huge pages, as far as it fills them and the kernel grants them.

    Streaming through pages of 4 KiB costs a virtual machine a good part of its memory bandwidth in address
    translation. The system maps the memory as it is first written, 2 MiB at a time.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped = torch.frombuffer(memory, dtype=torch.uint8)  # unmaps it with the last tensor in it
    start = -mapped.data_ptr() % _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE_PAGE * _HUGE_PAGE)
    return mapped[start : start + nbytes].view(dtype).view(*shape)


def free_gpu_bytes(device: torch.device) -> int:
    """What can be taken on a GPU now: what the driver has, and what torch keeps for the next tensor."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Arena:
    """One piece of memory that tensors are cut from; it is given back with the last of them."""

    def __init__(self, nbytes: int, num_tensors: int, device: torch.device) -> None:
        """Room for ``num_tensors`` tensors of ``nbytes`` bytes in all."""
        self._free = empty([nbytes + num_tensors * _CACHE_LINE], torch.uint8, device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of undefined content that starts at a cache line. ValueError when there is no room left."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > len(self._free):
            raise ValueError(f"the arena has room for {len(self._free)} bytes, not for {nbytes}")
        tensor = self._free[:nbytes].view(dtype).view(*shape)
        self._free = self._free[-(-nbytes // _CACHE_LINE) * _CACHE_LINE :]
        return tensor
