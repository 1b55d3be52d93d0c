"""Rows whose keys and values lie in shuffled pages, as the kernels read them and as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.cards import Shape
from benchmarks.gpu.case import Site
from petalsd.ops.decode_batch import ORIGINS_MULTIPLE, DecodeBatch, PrefillBatch
from petalsd.ops.ragged import PagedKV

PAGE_TOKENS = 32  # the default of engine.page_tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """``contexts`` tokens of each row in each block, in pages of a slab; runs begin with the page of block 0.

    kv       random
    origins  int32 ``[R, max_runs]``
    """

    kv: PagedKV
    origins: torch.Tensor
    contexts: tuple[int, ...]

    @classmethod
    def draw(cls, site: Site, shape: Shape, contexts: Sequence[int], num_blocks: int = 1) -> Rows:
        runs = [-(-context // PAGE_TOKENS) for context in contexts]
        shuffled = torch.randperm(sum(runs)) * num_blocks + 1  # page 0 is never used
        width = -(-max(runs) // ORIGINS_MULTIPLE) * ORIGINS_MULTIPLE
        origins = torch.zeros(len(contexts), width, dtype=torch.int64)
        for row, pages in enumerate(shuffled.split(runs)):
            origins[row, : len(pages)] = pages
        size = (sum(runs) * num_blocks + 1, PAGE_TOKENS, shape.num_kv_heads, shape.head_dim)
        return cls(PagedKV(site.randn(*size), site.randn(*size)), site.ints(origins), tuple(contexts))

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor(self.contexts, dtype=torch.int32, device=self.origins.device)

    def decode(self) -> DecodeBatch:
        """The last token of each row is new."""
        last = self.lengths - 1
        runs = (last // PAGE_TOKENS).long()
        origins = self.origins.gather(1, runs[:, None]).squeeze(1)
        return DecodeBatch(last, self.lengths, self.origins, origins, last % PAGE_TOKENS)

    def prefill(self, new_tokens: int) -> PrefillBatch:
        """The last ``new_tokens`` tokens of each row are new."""
        device, num_rows = self.origins.device, len(self.contexts)
        first = self.lengths - new_tokens
        positions = (first[:, None] + torch.arange(new_tokens, dtype=torch.int32, device=device)).flatten()
        rows = torch.arange(num_rows, device=device).repeat_interleave(new_tokens)
        origins = self.origins[rows, (positions // PAGE_TOKENS).long()]
        starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * new_tokens
        return PrefillBatch(positions, self.lengths, self.origins, origins, positions % PAGE_TOKENS, starts)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[R, Hkv, C, D]`` of rows of one length, copied."""
        tokens = torch.arange(self.contexts[0], device=self.origins.device)
        pages = self.origins[:, tokens // PAGE_TOKENS].long()
        slots = (pages * PAGE_TOKENS + tokens % PAGE_TOKENS).flatten()
        shape = (len(self.contexts), self.contexts[0], *self.kv.k.shape[2:])
        k, v = (states.view(shape).transpose(1, 2).contiguous() for states in self.kv.gather(slots))
        return k, v
