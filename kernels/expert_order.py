"""Which tokens go to which expert: pairs of a token and an expert by expert, and where blocks of them begin."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pairs_by_expert(experts, first, num_pairs, expert, num_experts, PAIRS_BLOCK: tl.constexpr):
    """Whether each of the pairs from ``first`` is an expert's: int32 ``[E, PAIRS_BLOCK]``, and the pairs."""
    pair = first + tl.arange(0, PAIRS_BLOCK)
    found = tl.load(experts + pair, mask=pair < num_pairs, other=0)
    # A router that meets NaN may say anything: no weights are read behind the last ones.
    found = tl.minimum(tl.maximum(found, 0), num_experts - 1).to(tl.int32)
    return ((found[None, :] == expert[:, None]) & (pair < num_pairs)[None, :]).to(tl.int32), pair


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "num_experts"])
def expert_order_kernel(
    experts,
    order,
    blocks,
    num_pairs,
    num_blocks,
    num_experts,
    EXPERTS_BLOCK: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
):
    """Grid (1,); ``ops.expert_order`` has shapes and meaning. Pairs are counted by comparison with all experts."""
    FIELDS: tl.constexpr = 4
    expert = tl.arange(0, EXPERTS_BLOCK)
    counts = tl.zeros([EXPERTS_BLOCK], tl.int32)
    for first in range(0, num_pairs, PAIRS_BLOCK):
        is_there, _ = _pairs_by_expert(experts, first, num_pairs, expert, num_experts, PAIRS_BLOCK)
        counts += tl.sum(is_there, axis=1)
    ends = tl.cumsum(counts, axis=0)
    blocks_of = (counts + ROWS_BLOCK - 1) // ROWS_BLOCK
    ends_of = tl.cumsum(blocks_of, axis=0)
    for number in range(tl.max(blocks_of, axis=0)):
        place = blocks + (ends_of - blocks_of + number) * FIELDS
        start = ends - counts + number * ROWS_BLOCK
        tl.store(place, expert, mask=number < blocks_of)
        tl.store(place + 1, start, mask=number < blocks_of)
        tl.store(place + 2, tl.minimum(start + ROWS_BLOCK, ends), mask=number < blocks_of)
    for first in range(tl.sum(blocks_of, axis=0), num_blocks, EXPERTS_BLOCK):
        unused = first + expert
        for field in tl.static_range(3):
            tl.store(blocks + unused * FIELDS + field, 0, mask=unused < num_blocks)
    places = ends - counts
    for first in range(0, num_pairs, PAIRS_BLOCK):
        is_there, pair = _pairs_by_expert(experts, first, num_pairs, expert, num_experts, PAIRS_BLOCK)
        before = places[:, None] + tl.cumsum(is_there, axis=1) - 1
        tl.store(order + tl.sum(is_there * before, axis=0), pair, mask=pair < num_pairs)
        places += tl.sum(is_there, axis=1)


@triton.jit
def pairs_of_block(order, start, end, ROWS_BLOCK: tl.constexpr):
    """The pairs of a block, int32 ``[ROWS_BLOCK]``, and which of them there are."""
    place = start + tl.arange(0, ROWS_BLOCK)
    return tl.load(order + place, mask=place < end, other=0), place < end
