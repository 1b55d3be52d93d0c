"""Slabs of more elements than 32 bits count, of which the host holds only the pages that are touched."""

from __future__ import annotations

import math
import mmap

import torch

from petalsd.ops.ragged import PagedKV
from tests.device import DEVICE

_MAP_NORESERVE = 0x4000  # of Linux; mmap has no name for it in Python 3.11
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def sparse_pages(last_page: int, page_tokens: int, num_kv_heads: int, head_dim: int) -> PagedKV:
    """Float32 pages up to ``last_page``, whose elements have numbers beyond 2^31; zeros until written."""
    shape = (last_page + 1, page_tokens, num_kv_heads, head_dim)
    assert math.prod(shape[1:]) * last_page >= 1 << 31
    if DEVICE.type != "cpu":
        return PagedKV(torch.zeros(shape), torch.zeros(shape))
    size = math.prod(shape) * torch.float32.itemsize
    slabs = (torch.frombuffer(mmap.mmap(-1, size, flags=_FLAGS), dtype=torch.float32) for _ in range(2))
    return PagedKV(*(slab.view(shape) for slab in slabs))
