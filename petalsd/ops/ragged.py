"""The tensors that describe one engine iteration to the models: who fills what, and in which shape.

Symbols: ``T`` tokens, ``R`` rows, ``P`` tokens per page, ``Hkv`` KV heads, ``D`` head size, ``M`` hidden size,
``N`` physical pages.

A *row* is one sequence of one session (a session of batch size B has B rows). A row's KV lives in *runs*: run j
holds its tokens ``j*P .. (j+1)*P - 1`` in consecutive physical pages, one per block of the session, in block
order. So one number per run addresses every block:

    physical page of (row, run j, block b) = origins[row, j] + b
    where origins[row, j] = first physical page of the run - first block of the session

and one small table serves all blocks of the span. Physical page 0 is never allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from petalsd.ops.attention_plan import AttentionPlan
    from petalsd.ops.decode_batch import KernelRows


@dataclass(slots=True)
class PagedKV:
    """The KV slab. ``k`` and ``v``: ``[N, P, Hkv, D]``, the model's dtype, on the device; K is stored rotated."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def page_tokens(self) -> int:
        return self.k.shape[1]

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        """All memory of the pages; the first dimension of each is ``N``."""
        return self.k, self.v

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put the keys and values ``[T, Hkv, D]`` of T tokens into their slots ``[T]``.

        A *slot* is the place of one token in one block: ``page * P + offset``.
        """
        self.k.flatten(0, 1).index_copy_(0, slots, k)
        self.v.flatten(0, 1).index_copy_(0, slots, v)

    def gather(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values in these slots ``[T]``: ``[T, Hkv, D]`` each, in the model's dtype."""
        return self.k.flatten(0, 1).index_select(0, slots), self.v.flatten(0, 1).index_select(0, slots)


@dataclass(slots=True)
class RaggedBatch:
    """R rows, concatenated along tokens. Built by ``engine.batch``, read by ``models`` and ``ops``.

    token_bounds   R+1 host ints; row i's new tokens are ``token_bounds[i]:token_bounds[i+1]`` of the batch
    context_lens   R host ints; tokens that row i attends to, its new tokens included
    positions      ``[T]`` int64, on a GPU int32; absolute position of each new token
    origins        ``[R, max_runs]`` int32; see the module docstring; entries past the row's runs are undefined
    write_origins  ``[T]`` as positions; origin of the run that each new token is written to
    write_offsets  ``[T]`` as positions; its place within that page, ``0 .. P-1``
    plans          what ``ops`` derived from the above, by window; so a batch is not changed once it is built
    kernel_rows    the same as GPU kernels take it; None until somebody asks, or has staged it
    """

    token_bounds: Sequence[int]
    context_lens: Sequence[int]
    positions: torch.Tensor
    origins: torch.Tensor
    write_origins: torch.Tensor
    write_offsets: torch.Tensor
    plans: dict[int | None, AttentionPlan] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    kernel_rows: KernelRows | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return self.token_bounds[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest row; its last token's position and one."""
        return max(self.context_lens)
