"""Bytes, pages and tokens: what the KV cache of a span costs. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of one page: ``page_tokens`` tokens of one row in one block, keys and values.

    stored         dtype of the elements; int8 has a float32 scale for each token and KV head
    is_head_major  in the order of the CPU kernels (``ops.head_major``) instead of token by token

    Raises ValueError when a number is not positive.
    """

    page_tokens: int
    num_kv_heads: int
    head_dim: int
    stored: torch.dtype
    is_head_major: bool = False

    def __post_init__(self) -> None:
        for name in ("page_tokens", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: a page needs at least 1")

    @property
    def slab_page_bytes(self) -> int:
        """Bytes of a page's keys, or of its values."""
        scale_bytes = _SCALE_BYTES if self.stored == torch.int8 else 0
        head_bytes = self.head_dim * self.stored.itemsize + scale_bytes
        return self.page_tokens * self.num_kv_heads * head_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, keys and values."""
        return 2 * self.slab_page_bytes

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """``(P, Hkv, D)``."""
        return self.page_tokens, self.num_kv_heads, self.head_dim

    def tokens_to_pages(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens of one row in one block."""
        return -(-tokens // self.page_tokens)


def pages_for(kv_tokens: int, num_blocks: int, page_tokens: int) -> int:
    """Physical pages, page 0 included, of a pool for ``kv_tokens`` tokens in each of ``num_blocks`` blocks.

    Rounded up to whole pages, so the smallest pool still holds one session of ``kv_tokens`` tokens.
    """
    return 1 + num_blocks * -(-kv_tokens // page_tokens)


def tokens_for(memory_bytes: int, num_blocks: int, geometry: KVGeometry) -> int:
    """The most ``kv_tokens`` whose pool fits into ``memory_bytes``; 0 when not even one page per block fits."""
    runs = (memory_bytes // geometry.page_bytes - 1) // num_blocks
    return max(0, runs) * geometry.page_tokens
