"""How the rows of a batch are attended to: computed once per batch and window, used by every block.

A *slot* is the place of one token in one block, ``page * P + offset``. Plans hold the slots of block 0; those
of block b lie ``b * P`` further. Every slot of a plan belongs to a token that its row has written: padding repeats
the row's last token, so what other sessions left in a page never enters a computation, not even times zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petalsd.ops.ragged import RaggedBatch

MAX_GATHER_TOKENS = 32768
"""Context tokens that one group gathers at a time: bounds the memory of a decode step."""

_PADDING_RATIO = 2
_UNPADDED_TOKENS = 128


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows with one new token each, attended to in one call.

    tokens    ``[R]`` int64, the rows' tokens in the batch; None when they are the batch, in its order
    slots     ``[R * L]`` int64, each row's context, padded
    is_valid  ``[R, 1, 1, L]`` bool, False where padded; None when nothing is
    keys      ``[R, L]`` int64, the positions of the context tokens; padding repeats the last
    """

    tokens: torch.Tensor | None
    slots: torch.Tensor
    is_valid: torch.Tensor | None
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A row with n > 1 new tokens, ``start:end`` of the batch.

    slots    ``[C]`` int64, the context that some new token sees
    visible  ``[n, C]`` bool; None when it is plainly causal from position 0
    keys     ``[C]`` int64, the positions of the context tokens
    """

    start: int
    end: int
    slots: torch.Tensor
    visible: torch.Tensor | None
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillRow, ...]


def plan_attention(batch: RaggedBatch, page_tokens: int, window: int | None) -> AttentionPlan:
    """The batch's plan for blocks with this window, from the batch when it was made before.

    window  a token sees itself and the ``window - 1`` before it; None: everything before it
    """
    plan = batch.plans.get(window)
    if plan is None:
        plan = batch.plans[window] = _make_plan(batch, page_tokens, window)
    return plan


def group_rows(lengths: Sequence[int], max_tokens: int = MAX_GATHER_TOKENS) -> list[list[int]]:
    """Split rows, given by what each must gather, so that padding to the longest stays cheap.

    In a group the longest is at most twice the shortest (or all are short), and the padded total is at most
    ``max_tokens`` unless a single row is longer. Returns indices into ``lengths``, ascending in each group.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[row]
        if groups:
            group = groups[-1]
            is_near = length <= max(_PADDING_RATIO * lengths[group[0]], _UNPADDED_TOKENS)
            if is_near and (len(group) + 1) * length <= max_tokens:
                group.append(row)
                continue
        groups.append([row])
    return [sorted(group) for group in groups]


def _make_plan(batch: RaggedBatch, page_tokens: int, window: int | None) -> AttentionPlan:
    bounds = batch.token_bounds
    decode = [row for row in range(batch.num_rows) if bounds[row + 1] - bounds[row] == 1]
    prefill = [row for row in range(batch.num_rows) if bounds[row + 1] - bounds[row] > 1]
    gathered = [min(batch.context_lens[row], window or batch.context_lens[row]) for row in decode]
    return AttentionPlan(
        decode=tuple(
            _plan_decode(batch, [decode[i] for i in group], [gathered[i] for i in group], page_tokens)
            for group in group_rows(gathered)
        ),
        prefill=tuple(_plan_prefill(batch, row, page_tokens, window) for row in prefill),
    )


def _plan_decode(batch: RaggedBatch, rows: list[int], gathered: list[int], page_tokens: int) -> DecodeGroup:
    device = batch.origins.device
    width = max(gathered)
    is_whole_batch = len(rows) == batch.num_tokens == batch.num_rows
    ends = torch.tensor([[batch.context_lens[row]] for row in rows], device=device)
    if min(gathered) == width:
        is_valid = None
        positions = ends + torch.arange(-width, 0, device=device)
    else:
        offsets, counts = torch.arange(width, device=device), torch.tensor(gathered, device=device)[:, None]
        is_valid = (offsets < counts)[:, None, None, :]
        positions = torch.minimum(ends - counts + offsets, ends - 1)
    return DecodeGroup(
        tokens=None
        if is_whole_batch
        else torch.tensor([batch.token_bounds[row] for row in rows], device=device),
        slots=_slots(
            batch.origins if is_whole_batch else batch.origins[rows], positions, page_tokens
        ).flatten(),
        is_valid=is_valid,
        keys=positions,
    )


def _plan_prefill(batch: RaggedBatch, row: int, page_tokens: int, window: int | None) -> PrefillRow:
    device = batch.origins.device
    start, end, context = batch.token_bounds[row], batch.token_bounds[row + 1], batch.context_lens[row]
    first_new = context - (end - start)
    oldest = 0 if window is None else max(0, first_new + 1 - window)
    keys = torch.arange(oldest, context, device=device)
    visible = None
    if first_new > 0 or (window is not None and window < context):
        visible = visible_keys(torch.arange(first_new, context, device=device), keys, window)
    return PrefillRow(start, end, _slots(batch.origins[row], keys, page_tokens), visible, keys)


def visible_keys(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """``[n, C]`` bool: which key positions ``[C]`` each query position ``[n]`` attends to."""
    distance = queries[:, None] - keys
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _slots(origins: torch.Tensor, positions: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """Slots in block 0 of positions ``[..., L]`` of the rows whose origins ``[..., max_runs]`` these are."""
    runs = positions.div(page_tokens, rounding_mode="floor")
    first_page = origins.gather(-1, runs).long()
    return first_page * page_tokens + positions % page_tokens
