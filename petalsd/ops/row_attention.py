"""Attention over pages on a GPU, of whatever rows a batch has."""

from __future__ import annotations

import torch

from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_attention import DecodePlan, decode_attention
from petalsd.ops.decode_batch import KernelRows
from petalsd.ops.prefill_attention import prefill_attention
from petalsd.ops.ragged import PagedKV


def attend_rows(
    q: torch.Tensor,
    kv: PagedKV,
    rows: KernelRows,
    block: int,
    rule: AttentionRule,
    decode: DecodePlan | None,
    out: torch.Tensor,
) -> None:
    """Each new token attends to its row's context, as ``decode_attention`` and ``prefill_attention`` say.

    q, out  ``[T, H, D]``
    decode  for so many rows as have a single token; None: there are none
    """
    first = rows.num_decodes
    if rows.decode is not None:
        assert decode is not None
        decode_attention(q[:first], kv, rows.decode, block, rule, decode, out[:first])
    if rows.prefill is not None:
        prefill_attention(q[first:], kv, rows.prefill, block, rule, out[first:])
