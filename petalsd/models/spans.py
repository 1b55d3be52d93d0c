"""What computes the steps of consecutive blocks: C++ on a CPU, kernels on a GPU, or one block after the other."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TypeAlias, TypeGuard, cast

import torch

from petalsd import _C
from petalsd.models.block import TransformerBlock
from petalsd.models.hf.block import LayerBlock
from petalsd.models.native_span import NativeSpan, can_be_native
from petalsd.models.paged_span import BlockByBlock, ChainedSpans, PagedBlock, PagedSpan
from petalsd.types import BlockSpan

# What the GPU kernels take: they move whole 16-byte words, and have a head, and a group of heads, in registers.
_KERNEL_MULTIPLE = 16
_MAX_KERNEL_HEAD_DIM = 256
_MAX_KERNEL_GROUP = 32

_Group: TypeAlias = Mapping[int, PagedBlock]


def paged_span(blocks: Mapping[int, PagedBlock], num_threads: int, tier: str = "auto") -> PagedSpan:
    """The consecutive ``blocks``, by kernels on a GPU, and with steps in C++ on ``num_threads`` threads on a CPU,
    where that is possible.

    ``tier`` forces kernels of the CPU for tests; KVPoolError names those that there are, or what the processor
    lacks.
    """
    team = _C.ThreadTeam(num_threads) if any(map(can_be_native, blocks.values())) else None

    def span_of(group: _Group) -> PagedSpan:
        block = next(iter(group.values()))
        if can_be_native(block) and team is not None:
            return NativeSpan(cast(Mapping[int, TransformerBlock], group), team, tier)
        if can_be_fused(block):
            return _kernel_span(cast(Mapping[int, TransformerBlock], group))
        if can_attend_by_kernels(block):
            return _layer_span(cast(Mapping[int, LayerBlock], group))
        return BlockByBlock(group)

    parts: list[tuple[BlockSpan, PagedSpan]] = []
    for _, indices in groupby(sorted(blocks), lambda index: _kind(blocks[index])):
        group = {index: blocks[index] for index in indices}
        parts.append((BlockSpan(min(group), max(group) + 1), span_of(group)))
    return parts[0][1] if len(parts) == 1 else ChainedSpans(parts)


def _kind(block: PagedBlock) -> tuple[bool, ...]:
    """Blocks of one kind can be in one span."""
    is_layer, is_captured = False, False
    if can_attend_by_kernels(block):
        is_layer, is_captured = True, block.is_capturable
    return can_be_native(block), can_be_fused(block), is_layer, is_captured


def can_be_fused(block: PagedBlock) -> TypeGuard[TransformerBlock]:
    """Whether the kernels of GPUs compute all that ``block`` does, and it is on one."""
    if not isinstance(block, TransformerBlock):
        return False
    config = block.config
    widths = (config.head_dim, config.hidden_size, config.intermediate_size)
    return (
        block.device.type == "cuda"
        and config.head_dim <= _MAX_KERNEL_HEAD_DIM
        and config.kv_groups <= _MAX_KERNEL_GROUP
        and all(width % _KERNEL_MULTIPLE == 0 for width in widths)
    )


def can_attend_by_kernels(block: PagedBlock) -> TypeGuard[LayerBlock]:
    """Whether the kernels of GPUs compute the attention of a layer of transformers, and it is on one."""
    if not isinstance(block, LayerBlock) or not block.uses_kernels:
        return False
    config = block.config
    return (
        block.device.type == "cuda"
        and config.head_dim <= _MAX_KERNEL_HEAD_DIM
        and config.head_dim % _KERNEL_MULTIPLE == 0
        and config.kv_groups <= _max_group(config.head_dim, block.dtype)
    )


def has_kernels(block: PagedBlock) -> TypeGuard[LayerBlock]:
    """Whether kernels, the CPU's or a GPU's, compute the attention of a layer of transformers."""
    is_native = isinstance(block, LayerBlock) and block.team is not None and block.uses_kernels
    return is_native or can_attend_by_kernels(block)


def _max_group(head_dim: int, dtype: torch.dtype) -> int:
    """Query heads to a KV head that fit into a tile of ``prefill_attention``; the decode kernel cuts them up."""
    if dtype == torch.float32:
        return 64 if head_dim <= 128 else 32
    return 128 if head_dim <= 128 else 64


# Triton comes with torch for GPUs; nobody else should need it.


def _kernel_span(blocks: Mapping[int, TransformerBlock]) -> PagedSpan:
    from petalsd.models.kernel_span import KernelSpan

    return KernelSpan(blocks)


def _layer_span(blocks: Mapping[int, LayerBlock]) -> PagedSpan:
    from petalsd.models.hf.layer_span import LayerSpan

    return LayerSpan(blocks)
