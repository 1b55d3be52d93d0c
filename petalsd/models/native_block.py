"""Decode steps of a block on the CPU in one call of C++, over the very tensors that the block holds.

Torch spends more time between the small operations of a one-token step than in them, and emulates bfloat16 on
processors that lack it. Prefill, passes and everything that the C++ code does not compute stay with the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from petalsd import _C
from petalsd.models.block import TransformerBlock
from petalsd.ops.ragged import PagedKV, RaggedBatch

_DTYPES = (torch.float32, torch.bfloat16)
_ACTIVATIONS = ("silu", "swish")
_MAX_HEAD_DIM = 512
_MAX_GROUP = 64
_NO_TENSOR = 0

CosSin = tuple[torch.Tensor, torch.Tensor]


class PagedBlock(Protocol):
    """A block as the engine's runner sees it; ``TransformerBlock.forward_paged`` is the contract."""

    def forward_paged(
        self, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor: ...


def native_blocks(
    blocks: Mapping[int, PagedBlock], num_threads: int, tier: str = "auto"
) -> dict[int, PagedBlock]:
    """Each block with its decode steps in C++ where that is possible; the others as they are.

    ``tier`` forces kernels for tests: ``baseline`` or ``avx2``.
    """
    team = DecodeTeam(num_threads)
    return {
        index: NativeBlock(block, team, tier)
        if isinstance(block, TransformerBlock) and can_be_native(block)
        else block
        for index, block in blocks.items()
    }


def can_be_native(block: TransformerBlock) -> bool:
    """Whether the C++ code computes what ``block`` does, on this device and in its dtype."""
    config = block.config
    return (
        block.device.type == "cpu"
        and block.dtype in _DTYPES
        and config.activation in _ACTIVATIONS
        and config.head_dim <= _MAX_HEAD_DIM
        and config.head_dim % 2 == 0
        and config.kv_groups <= _MAX_GROUP
    )


class DecodeTeam:
    """The threads that a model's blocks share, and their view of the batch at hand."""

    def __init__(self, num_threads: int) -> None:
        self.threads = _C.ThreadTeam(num_threads)
        self._rows: _C.DecodeRows | None = None
        self._made_of: tuple[object, ...] = ()

    def rows(self, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin) -> _C.DecodeRows:
        """The batch as the C++ code reads it; the same for all blocks, so it is made by the first of them.

        The tensors are kept until the next batch, since the result points into them.
        """
        parts = (kv.k, kv.v, batch.origins, batch.positions, *cos_sin)
        if self._rows is None or any(a is not b for a, b in zip(parts, self._made_of, strict=True)):
            cos, sin = cos_sin
            if not all(tensor.is_contiguous() for tensor in parts) or batch.origins.dtype != torch.int32:
                raise ValueError("decode steps read contiguous tensors, and origins in int32")
            self._rows = _C.DecodeRows(
                batch.num_rows,
                [kv.k.data_ptr(), kv.v.data_ptr(), cos.data_ptr(), sin.data_ptr()],
                kv.page_tokens,
                batch.origins.data_ptr(),
                batch.origins.shape[1],
                batch.positions.data_ptr(),
            )
            self._made_of = parts
        return self._rows


class NativeBlock:
    """``block`` with another way to decode. Float32 throughout: bfloat16 is rounded to once, at the end."""

    def __init__(self, block: TransformerBlock, team: DecodeTeam, tier: str = "auto") -> None:
        config, weights = block.config, block.weights
        self.block = block
        self._team = team
        # The C++ block points into these.
        self._tensors = (
            weights.input_norm, weights.qkv, weights.qkv_bias, weights.q_norm, weights.k_norm, weights.output,
            weights.output_bias, weights.mlp_norm, weights.gate_up, weights.gate_up_bias, weights.down,
            weights.down_bias,
        )  # fmt: skip
        if not all(tensor is None or tensor.is_contiguous() for tensor in self._tensors):
            raise ValueError("the weights of a native block must be contiguous")
        self._native = _C.DecodeBlock(
            block.index,
            [
                config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
                config.intermediate_size, block.window or 0,
            ],
            config.norm_eps,
            [_NO_TENSOR if tensor is None else tensor.data_ptr() for tensor in self._tensors],
            block.dtype == torch.bfloat16,
            tier,
        )  # fmt: skip

    def forward_paged(
        self, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """As ``TransformerBlock.forward_paged``."""
        if not batch.is_decode:
            return self.block.forward_paged(hidden, kv, batch, cos_sin)
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        rows = self._team.rows(kv, batch, cos_sin)
        self._native.run(rows, hidden.data_ptr(), out.data_ptr(), self._team.threads)
        return out
