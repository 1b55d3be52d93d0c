"""Writing keys and values into the pages of a batch's rows."""

from __future__ import annotations

import torch

from petalsd.ops.ragged import PagedKV, RaggedBatch


def write_kv(k: torch.Tensor, v: torch.Tensor, kv: PagedKV, batch: RaggedBatch, block: int) -> None:
    """Store the new tokens of all rows, in place in the slab.

    k, v   ``[T, Hkv, D]`` in the slab's dtype, k rotated
    block  index of the block, which selects the page within each token's run
    """
    slots = (batch.write_origins.long() + block).mul_(kv.page_tokens).add_(batch.write_offsets)
    kv.write(slots, k, v)
