"""Blocks as a GPU has them, on the CPU, where Triton's interpreter runs their kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from petalsd.models.block import TransformerBlock
from petalsd.models.kernel_span import KernelSpan
from petalsd.ops.packed_weight import PackedWeight

NUM_SMS = 16
"""So that contexts of a few tiles are split."""


def unpacked(block: TransformerBlock) -> TransformerBlock:
    """The same block over plain tensors."""
    weights = block.weights
    matrices = {
        name: matrix.unpack(block.dtype).contiguous()
        for name in ("qkv", "output", "gate_up", "down")
        if isinstance(matrix := getattr(weights, name), PackedWeight)
    }
    return TransformerBlock(block.index, block.config, replace(weights, **matrices), block.rope)


def kernel_span(blocks: Iterable[TransformerBlock]) -> KernelSpan:
    """What serves these blocks on a GPU."""
    return KernelSpan({block.index: unpacked(block) for block in blocks}, NUM_SMS)
