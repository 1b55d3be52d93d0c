"""Rows in a KV slab without a pool, for tests of ops and blocks: runs lie anywhere, unwritten tokens are NaN."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.ragged import PagedKV, RaggedBatch


class PagedRows:
    """Rows in one slab. Each run takes ``num_blocks`` consecutive pages somewhere; what nobody wrote is NaN."""

    def __init__(
        self,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        page_tokens: int,
        num_runs: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (1 + num_runs * num_blocks, page_tokens, num_kv_heads, head_dim)
        self.kv = PagedKV(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))
        self._shape = shape
        self.first_block = 0
        free = [1 + run * num_blocks for run in range(num_runs)]
        random.Random(0).shuffle(free)
        self._free = free
        self._runs: list[list[int]] = []
        self.lengths: list[int] = []

    def in_head_major(self, stored: torch.dtype | None = None) -> PagedRows:
        """Itself, with empty pages in the order of the CPU kernels; ``stored`` is int8 or the dtype."""
        self.kv = HeadMajorKV.allocate(self._shape, self.kv.k.dtype, stored)
        for slab in self.kv.slabs:
            slab.fill_(torch.nan if slab.is_floating_point() else -128)
        return self

    def add_row(self) -> int:
        self._runs.append([])
        self.lengths.append(0)
        return len(self.lengths) - 1

    def extend(self, new_tokens: dict[int, int]) -> RaggedBatch:
        """A batch that appends ``new_tokens[row]`` tokens to each of these rows, in this order."""
        page_tokens = self.kv.page_tokens
        bounds, positions = [0], []
        write_origins: list[int] = []
        for row, count in new_tokens.items():
            start, end = self.lengths[row], self.lengths[row] + count
            while len(self._runs[row]) * page_tokens < end:
                self._runs[row].append(self._free.pop() - self.first_block)
            bounds.append(bounds[-1] + count)
            positions += range(start, end)
            write_origins += [self._runs[row][position // page_tokens] for position in range(start, end)]
            self.lengths[row] = end
        return RaggedBatch(
            token_bounds=bounds,
            context_lens=[self.lengths[row] for row in new_tokens],
            positions=torch.tensor(positions),
            origins=self._origins(list(new_tokens)),
            write_origins=torch.tensor(write_origins),
            write_offsets=torch.tensor([position % page_tokens for position in positions]),
        )

    def _origins(self, rows: Sequence[int]) -> torch.Tensor:
        """Entries past a row's runs are nonsense on purpose."""
        width = max(len(self._runs[row]) for row in rows) + 1
        padded = [self._runs[row] + [2**30] * (width - len(self._runs[row])) for row in rows]
        return torch.tensor(padded, dtype=torch.int32)
