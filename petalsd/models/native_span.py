"""Steps of consecutive blocks on the CPU in one call of C++, over the very memory that blocks and pages hold.

Torch spends more time between the small operations of a one-token step than in them, emulates bfloat16 on
processors that lack it, and copies keys and values before it attends to them. Passes, pages in another order, and
everything that the C++ code does not compute stay with the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import torch

from petalsd import _C
from petalsd.models.block import BlockWeights, TransformerBlock
from petalsd.models.contract import Block
from petalsd.models.paged_span import BlockByBlock, CosSin, PagedBlock
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.native_attention import has_native_order
from petalsd.ops.packed_weight import PackedWeight, native_weight
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.types import BlockSpan

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ACTIVATIONS = ("silu", "swish")


def can_be_native(block: PagedBlock) -> TypeGuard[TransformerBlock]:
    """Whether the C++ code computes what ``block`` does, on this device and in its dtype."""
    if not isinstance(block, TransformerBlock) or block.weights.is_adapted:
        return False
    return can_attend_natively(block) and block.config.activation in _ACTIVATIONS


def can_attend_natively(block: Block) -> bool:
    """Whether the C++ code computes the attention of ``block``, on this device and in its dtype."""
    return block.device.type == "cpu" and has_native_order(block.config.head_dim, block.dtype)


class NativeSpan:
    """Blocks with another way to compute a step. Float32 between the operations: what leaves the span is rounded,
    once."""

    def __init__(
        self, blocks: Mapping[int, TransformerBlock], team: _C.ThreadTeam, tier: str = "auto"
    ) -> None:
        self._blocks = BlockByBlock(blocks)
        self._weights = [block.weights for block in blocks.values()]  # the C++ blocks point into these
        self._team = team
        native = [native_block(blocks[index], tier) for index in sorted(blocks)]
        self._span = _C.Span(native)
        self.tier = native[0].tier

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """As ``PagedSpan``; one call at a time."""
        if not isinstance(kv, HeadMajorKV):
            return self._blocks.forward_paged(blocks, hidden, kv, batch, cos_sin)
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        rows = step_rows(hidden.dtype, kv, batch, cos_sin)
        self._span.run(rows, blocks.start, len(blocks), hidden.data_ptr(), out.data_ptr(), self._team)
        return out


def native_block(block: TransformerBlock, tier: str) -> _C.SpanBlock:
    """The C++ view of a block; the block's weights must outlive it."""
    config, weights = block.config, block.weights
    return _C.SpanBlock(
        block.index,
        [
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.intermediate_size, block.window or 0,
        ],
        config.norm_eps,
        [native_weight(matrix) for matrix in _matrices(weights)],
        [
            [] if vector is None else vector.tolist()
            for vector in (
                weights.input_norm, weights.mlp_norm, weights.q_norm, weights.k_norm, weights.qkv_bias,
                weights.output_bias, weights.gate_up_bias, weights.down_bias,
            )
        ],
        tier,
    )  # fmt: skip


def _matrices(weights: BlockWeights) -> list[PackedWeight]:
    matrices = (weights.qkv, weights.output, weights.gate_up, weights.down)
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedWeight)]
    if len(packed) < len(matrices):
        raise ValueError("the matrices of a native block must be packed")
    return packed


def step_rows(dtype: torch.dtype, kv: HeadMajorKV, batch: RaggedBatch, cos_sin: CosSin) -> _C.StepRows:
    """The batch as the C++ code reads it; its tensors must outlive the result."""
    cos, sin = cos_sin
    parts = (batch.origins, batch.positions, cos, sin)
    if not all(tensor.is_contiguous() for tensor in parts) or batch.origins.dtype != torch.int32:
        raise ValueError("native steps read contiguous tensors, and origins in int32")
    return _C.StepRows(
        _DTYPES[dtype],
        batch.token_bounds,
        [cos.data_ptr(), sin.data_ptr(), batch.positions.data_ptr()],
        batch.origins.data_ptr(),
        batch.origins.shape[1],
        kv.native,
    )
