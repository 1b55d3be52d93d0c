"""Decode steps of consecutive blocks on the CPU in one call of C++, over the very tensors that the blocks hold.

Torch spends more time between the small operations of a one-token step than in them, and emulates bfloat16 on
processors that lack it. Prefill, passes and everything that the C++ code does not compute stay with the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeGuard

import torch

from petalsd import _C
from petalsd.models.block import BlockWeights, TransformerBlock
from petalsd.models.paged_span import BlockByBlock, ChainedSpans, CosSin, PagedBlock, PagedSpan
from petalsd.ops.packed_weight import PackedWeight
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.types import BlockSpan

_DTYPES = (torch.float32, torch.bfloat16)
_ACTIVATIONS = ("silu", "swish")
_MAX_HEAD_DIM = 512
_MAX_GROUP = 64
_NO_TENSOR = 0


def paged_span(blocks: Mapping[int, PagedBlock], num_threads: int, tier: str = "auto") -> PagedSpan:
    """The consecutive ``blocks``, with decode steps in C++ on ``num_threads`` threads where that is possible.

    ``tier`` forces kernels for tests; KVPoolError names those that there are, or what the processor lacks.
    """
    team = _C.ThreadTeam(num_threads)
    native = {index: block for index, block in blocks.items() if can_be_native(block)}
    parts: list[tuple[BlockSpan, PagedSpan]] = []
    for is_native, group in groupby(sorted(blocks), native.__contains__):
        indices = list(group)
        part: PagedSpan
        if is_native:
            part = NativeSpan({index: native[index] for index in indices}, team, tier)
        else:
            part = BlockByBlock({index: blocks[index] for index in indices})
        parts.append((BlockSpan(indices[0], indices[-1] + 1), part))
    return parts[0][1] if len(parts) == 1 else ChainedSpans(parts)


def can_be_native(block: PagedBlock) -> TypeGuard[TransformerBlock]:
    """Whether the C++ code computes what ``block`` does, on this device and in its dtype."""
    if not isinstance(block, TransformerBlock):
        return False
    config = block.config
    return (
        block.device.type == "cpu"
        and block.dtype in _DTYPES
        and not (isinstance(block.weights.qkv, PackedWeight) and block.weights.qkv.format.is_quantized)
        and config.activation in _ACTIVATIONS
        and config.head_dim <= _MAX_HEAD_DIM
        and config.head_dim % 2 == 0
        and config.kv_groups <= _MAX_GROUP
    )


class NativeSpan:
    """Blocks with another way to decode. Float32 between the operations: what leaves the span is rounded, once."""

    def __init__(
        self, blocks: Mapping[int, TransformerBlock], team: _C.ThreadTeam, tier: str = "auto"
    ) -> None:
        self._blocks = BlockByBlock(blocks)
        # The C++ blocks point into these.
        self._tensors = [plain_tensors(blocks[index].weights) for index in sorted(blocks)]
        self._team = team
        native = [
            native_block(blocks[index], tensors, tier)
            for index, tensors in zip(sorted(blocks), self._tensors, strict=True)
        ]
        self._span = _C.DecodeSpan(native)
        self.tier = native[0].tier

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """As ``PagedSpan``; one call at a time."""
        if not batch.is_decode:
            return self._blocks.forward_paged(blocks, hidden, kv, batch, cos_sin)
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        rows = decode_rows(kv, batch, cos_sin)
        self._span.run(rows, blocks.start, len(blocks), hidden.data_ptr(), out.data_ptr(), self._team)
        return out


def plain_tensors(weights: BlockWeights) -> list[torch.Tensor | None]:
    """The block's weights in the order of the C++ code, packed ones unpacked."""
    dtype = weights.input_norm.dtype
    parts = (
        weights.input_norm, weights.qkv, weights.qkv_bias, weights.q_norm, weights.k_norm, weights.output,
        weights.output_bias, weights.mlp_norm, weights.gate_up, weights.gate_up_bias, weights.down,
        weights.down_bias,
    )  # fmt: skip
    return [part.unpack(dtype).contiguous() if isinstance(part, PackedWeight) else part for part in parts]


def native_block(
    block: TransformerBlock, tensors: Sequence[torch.Tensor | None], tier: str
) -> _C.DecodeBlock:
    """The C++ view of a block; ``tensors``, its plain ones, must outlive it."""
    config = block.config
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        raise ValueError("the weights of a native block must be contiguous")
    return _C.DecodeBlock(
        block.index,
        [
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.intermediate_size, block.window or 0,
        ],
        config.norm_eps,
        [_NO_TENSOR if tensor is None else tensor.data_ptr() for tensor in tensors],
        block.dtype == torch.bfloat16,
        tier,
    )  # fmt: skip


def decode_rows(kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin) -> _C.DecodeRows:
    """The batch as the C++ code reads it; the tensors must outlive the result."""
    cos, sin = cos_sin
    parts = (kv.k, kv.v, batch.origins, batch.positions, cos, sin)
    if not all(tensor.is_contiguous() for tensor in parts) or batch.origins.dtype != torch.int32:
        raise ValueError("decode steps read contiguous tensors, and origins in int32")
    return _C.DecodeRows(
        batch.num_rows,
        [kv.k.data_ptr(), kv.v.data_ptr(), cos.data_ptr(), sin.data_ptr()],
        kv.page_tokens,
        batch.origins.data_ptr(),
        batch.origins.shape[1],
        batch.positions.data_ptr(),
    )
