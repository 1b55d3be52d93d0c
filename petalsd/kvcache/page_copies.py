"""The page copies of a pool: by torch anywhere, or by one kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from petalsd.ops.ragged import PagedKV

PageCopier: TypeAlias = Callable[[PagedKV, torch.Tensor], None]
"""Makes a group of copies ``[n, 2]`` int32 on the CPU, (source, target): no page is read after it was written."""


def page_copier(device: torch.device) -> PageCopier:
    return copy_by_kernel if device.type == "cuda" else copy_by_torch


def copy_by_torch(kv: PagedKV, pairs: torch.Tensor) -> None:
    """Through a temporary copy of the sources."""
    sources, targets = pairs.to(kv.k.device, torch.int64).unbind(1)
    for slab in kv.slabs:
        slab.index_copy_(0, targets, slab.index_select(0, sources))


def copy_by_kernel(kv: PagedKV, pairs: torch.Tensor) -> None:
    """All slabs in one launch for each part whose copies can be made at once: mostly for all."""
    from petalsd.ops.page_copies import copy_pages, independent_copies  # Triton, which only GPUs have

    device = kv.k.device
    for part in independent_copies(pairs.tolist()):
        sources, targets = (torch.tensor(pages, dtype=torch.int32) for pages in zip(*part, strict=True))
        copy_pages(kv, sources.to(device), targets.to(device))
