"""Pairs of a token and one of its experts, ordered by expert on their device: nothing waits for the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from petalsd.kernels.expert_order import expert_order_kernel
from petalsd.kernels.expert_sum import expert_sum_kernel
from petalsd.ops.launching import Options, check_tensor, launch, next_power_of_2, strides

_FIELDS = 4
_COMPARED_AT_ONCE = 4096
_SUM_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """The P = T * k pairs of a router's choice ``[T, k]``; pair p is token p // k with the expert in place p % k.

    order        int32 ``[P]``: pairs by expert, those of an expert by token
    blocks       int32 ``[B, 4]``: an expert, and where its next pairs start and end in ``order``; the last is
                 nothing. At most ``rows`` of one expert; blocks that are not needed end where they start
    num_experts  of which a pair can have one
    rows         of a block
    """

    order: torch.Tensor
    blocks: torch.Tensor
    num_experts: int
    rows: int


def order_experts(top_k_index: torch.Tensor, num_experts: int, rows: int) -> ExpertOrder:
    """The order of a choice ``[T, k]``, int64, in blocks of up to ``rows``; experts out of range are clamped.

    ValueError for a choice of another form.
    """
    if top_k_index.dim() != 2 or top_k_index.dtype != torch.int64 or not top_k_index.is_contiguous():
        raise ValueError(
            f"top_k_index is {top_k_index.dtype} of shape {list(top_k_index.shape)} and strides "
            f"{list(top_k_index.stride())}: it must be torch.int64 and contiguous, with 2 dimensions"
        )
    num_pairs = top_k_index.numel()
    num_blocks = (num_pairs + min(num_pairs, num_experts) * (rows - 1)) // rows  # nothing needs more
    order = top_k_index.new_empty(num_pairs, dtype=torch.int32)
    blocks = top_k_index.new_empty(num_blocks, _FIELDS, dtype=torch.int32)
    experts_block = max(16, next_power_of_2(num_experts))
    launch(
        expert_order_kernel,
        (min(1, num_pairs),),
        (top_k_index, order, blocks, num_pairs, num_blocks, num_experts),
        {
            "EXPERTS_BLOCK": experts_block,
            "PAIRS_BLOCK": max(8, min(32, _COMPARED_AT_ONCE // experts_block)),
            "ROWS_BLOCK": rows,
        },
        Options(num_warps=8, num_stages=1),
    )
    return ExpertOrder(order, blocks, num_experts, rows)


def sum_experts(rows: torch.Tensor, top_k_weights: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` = of each token its rows times their weights, summed in float32 in the order of pairs.

    rows           ``[T * k, M]``, one for each pair
    top_k_weights  ``[T, k]``
    out            ``[T, M]``

    ValueError for tensors that don't fit.
    """
    num_tokens, top_k = top_k_weights.shape
    width = out.shape[-1]
    check_tensor("rows", rows, (num_tokens * top_k, width))
    check_tensor("out", out, (num_tokens, width), rows.dtype)
    if not top_k_weights.is_contiguous():
        raise ValueError(f"top_k_weights has strides {list(top_k_weights.stride())}: it must be contiguous")
    launch(
        expert_sum_kernel,
        (num_tokens, -(-width // _SUM_BLOCK)),
        (rows, top_k_weights, out, strides(rows)[0], strides(out)[0]),
        {"WIDTH": width, "TOP_K": top_k, "BLOCK": _SUM_BLOCK},
        Options(num_warps=4, num_stages=1),
    )


def reference_sum_experts(rows: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The sums in float32 ``[T, M]``, in plain torch."""
    num_tokens, top_k = top_k_weights.shape
    return (rows.float().view(num_tokens, top_k, -1) * top_k_weights.float()[..., None]).sum(dim=1)
