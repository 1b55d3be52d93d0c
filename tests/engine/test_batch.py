"""The layout of batches: where segments are cut, and which page each token reads and writes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalsd.engine.batch import BatchItem, build_batch, select_items, step_ends
from petalsd.engine.limits import EngineLimits
from petalsd.engine.runner import split_segments
from petalsd.errors import ConfigError
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest
from petalsd.kvcache.sizing import KVGeometry
from petalsd.types import BlockSpan
from tests.engine.rig import CPU

spans = st.builds(
    lambda start, length: BlockSpan(start, start + length), st.integers(0, 8), st.integers(1, 5)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(spans, min_size=1, max_size=6))
def test_segments_cover_each_span_once_and_in_order(chosen: list[BlockSpan]) -> None:
    """Every item runs through exactly its blocks, ascending, and neighbouring segments differ in their items."""
    segments = split_segments(chosen, [None] * len(chosen))
    for number, span in enumerate(chosen):
        blocks = [block for segment in segments if number in segment.items for block in segment.blocks]
        assert blocks == list(span)
    for one, following in pairwise(segments):
        assert one.blocks.end <= following.blocks.start
    assert all(segment.items for segment in segments)


def test_segments_of_equal_spans() -> None:
    """Items of one span make one segment."""
    (segment,) = split_segments([BlockSpan(2, 5)] * 3, [None] * 3)
    assert (segment.blocks, segment.items) == (BlockSpan(2, 5), (0, 1, 2))


async def make_items(pool: KVPool, shapes: list[tuple[int, int, int]]) -> list[BatchItem]:
    """One session per (rows, start, tokens), in pages of 4 tokens."""
    items = []
    for rows, start, tokens in shapes:
        kv = await pool.reserve(KVRequest(0, 2, rows, 40), timeout_s=0)
        kv.extend(start + tokens)
        hidden = torch.zeros(rows * tokens, 8)
        items.append(BatchItem(BlockSpan(0, 2), kv, rows, start, tokens, start + tokens, hidden))
    pool.apply_copies()
    return items


@pytest.mark.parametrize(
    "shapes", [[(2, 3, 1), (1, 8, 1), (3, 0, 1)], [(2, 3, 6), (1, 0, 1), (1, 5, 9), (2, 12, 1)]]
)
async def test_tokens_are_written_where_the_page_table_says(shapes: list[tuple[int, int, int]]) -> None:
    """Each token's origin and offset are those of its position in its row's table; all places are different."""
    pool = KVPool(KVGeometry(4, 1, 8, torch.float32), 400, torch.float32, CPU)
    pool.allocate()
    items = await make_items(pool, shapes)
    batch = build_batch(items, pool)
    ragged = batch.ragged
    rows = [(start, tokens) for rows, start, tokens in shapes for _ in range(rows)]
    assert ragged.context_lens == [start + tokens for start, tokens in rows]
    places = set()
    for row, (start, tokens) in enumerate(rows):
        first, end = ragged.token_bounds[row : row + 2]
        assert end - first == tokens
        for token, position in zip(range(first, end), range(start, start + tokens), strict=True):
            assert ragged.positions[token] == position
            assert ragged.write_origins[token] == ragged.origins[row, position // 4]
            assert ragged.write_offsets[token] == position % 4
            places.add((int(ragged.write_origins[token]), int(ragged.write_offsets[token])))
    assert len(places) == ragged.num_tokens == sum(tokens for _, tokens in rows)
    assert step_ends(items).tolist() == [start + tokens for start, tokens in rows for _ in range(tokens)]


async def test_selecting_items_gives_their_own_batch() -> None:
    """The part of a batch that belongs to some items equals the batch built of these items alone."""
    pool = KVPool(KVGeometry(4, 1, 8, torch.float32), 400, torch.float32, CPU)
    pool.allocate()
    items = await make_items(pool, [(2, 3, 6), (1, 0, 1), (1, 5, 9), (2, 12, 1)])
    part, tokens = select_items(build_batch(items, pool), [1, 3])
    alone = build_batch([items[1], items[3]], pool).ragged
    assert tokens.tolist() == [12, 22, 23]
    assert (part.token_bounds, part.context_lens) == (alone.token_bounds, alone.context_lens)
    for name in ("positions", "write_origins", "write_offsets"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    for row, context in enumerate(part.context_lens):
        runs = -(-context // 4)
        assert torch.equal(part.origins[row, :runs], alone.origins[row, :runs])


@pytest.mark.parametrize(
    "wrong",
    [{"max_batch_tokens": 1}, {"max_sessions": 0}, {"step_deadline_s": -1.0}, {"max_queued_passes": 0}],
)
def test_limits_must_be_positive(wrong: dict[str, int]) -> None:
    """A limit that nothing fits into is a configuration error that names it."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineLimits(**wrong)


def test_a_chunk_is_at_most_half_a_batch() -> None:
    """With a small batch the chunk shrinks, and with it the rows that one session may have."""
    limits = EngineLimits(max_batch_tokens=100)
    assert (limits.chunk_tokens, limits.max_session_rows) == (50, 50)
    assert EngineLimits(max_sessions=3).max_session_rows == 3
