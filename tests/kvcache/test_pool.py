"""The slab and the pages together: what sessions write is what they read, through copies and moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from petalsd.errors import KVPoolError, SessionClosed
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest, KVSession
from petalsd.kvcache.sizing import KVGeometry


def table(pool: KVPool, session: KVSession) -> torch.Tensor:
    """``[batch, runs]`` origins."""
    runs = pool.geometry.tokens_to_pages(session.length)
    out = torch.zeros(session.batch, runs, dtype=torch.int32)
    assert pool.fill_origins([session], out.numpy()) == session.batch
    return out


def each_slot(pool: KVPool, session: KVSession, start: int) -> list[tuple[int, int, int, int, int]]:
    """(row, position, block, page, offset) of all tokens from ``start`` on."""
    origins, page_tokens, request = table(pool, session), pool.geometry.page_tokens, session.request
    return [
        (row, position, block, int(origins[row, position // page_tokens]) + block, position % page_tokens)
        for row in range(session.batch)
        for position in range(start, session.length)
        for block in range(request.first_block, request.first_block + request.num_blocks)
    ]


def grow(pool: KVPool, session: KVSession, count: int, mark: int) -> None:
    """One step of ``count`` tokens: row, position and block are readable in what it writes."""
    start = session.length
    session.extend(start + count)
    pool.apply_copies()
    for row, position, block, page, offset in each_slot(pool, session, start):
        pool.kv.k[page, offset] = mark + row * 16 + position
        pool.kv.v[page, offset] = block


def contents(pool: KVPool, session: KVSession) -> list[list[int]]:
    """What each row reads from its first block's keys; checks that the values are the right block's."""
    marks: list[list[int]] = [[] for _ in range(session.batch)]
    for row, _, block, page, offset in each_slot(pool, session, 0):
        assert pool.kv.v[page, offset].eq(block).all()
        assert pool.kv.k[page, offset].unique().numel() == 1
        if block == session.request.first_block:
            marks[row].append(int(pool.kv.k[page, offset, 0, 0]))
    return marks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
async def test_beams_continue_from_each_other(make_pool: Callable[..., KVPool], dtype: torch.dtype) -> None:
    """After a reorder each row reads its old row's tokens and writes its own, in any dtype."""
    pool = make_pool(100, dtype=dtype)
    session = await pool.reserve(KVRequest(3, 2, batch=3, max_tokens=12), 0)
    grow(pool, session, 6, mark=0)
    session.reorder((2, 2, 0))
    assert contents(pool, session) == [[*range(32, 38)], [*range(32, 38)], [*range(6)]]
    assert pool.stats().pages_shared == 2 * 2
    grow(pool, session, 1, mark=128)
    assert contents(pool, session) == [[*range(32, 38), 134], [*range(32, 38), 150], [*range(6), 166]]
    assert pool.stats().copies == 2  # the partly filled run of one row, a page per block


async def test_a_rollback_into_a_shared_run_copies_it_at_the_next_token(pool: KVPool) -> None:
    """Full runs that beams share are copied when a rollback makes them partial and a row writes again."""
    session = await pool.reserve(KVRequest(0, 1, batch=2, max_tokens=8), 0)
    grow(pool, session, 8, mark=0)
    session.reorder([0, 0])
    session.truncate(2)
    assert pool.stats().pages_mapped == 1
    grow(pool, session, 1, mark=100)
    assert contents(pool, session) == [[0, 1, 102], [0, 1, 118]]


@pytest.mark.parametrize("copy_limit", [1, 3, 1000])
async def test_moved_runs_keep_their_tokens(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch, copy_limit: int
) -> None:
    """When the free pages are scattered, runs move; the copies fit into the buffer however small it is."""
    monkeypatch.setattr(pool, "_copy_limit", copy_limit)
    sessions = [await pool.reserve(KVRequest(0, 3, batch=1, max_tokens=4), 0) for _ in range(8)]
    for number, session in enumerate(sessions):
        grow(pool, session, 4, mark=number * 4)
    for session in sessions[::2]:
        session.close()
    wide = await pool.reserve(KVRequest(5, 12, batch=1, max_tokens=4), 0)
    grow(pool, wide, 4, mark=40)
    assert pool.stats().pages_moved == 3 * 3
    assert contents(pool, wide) == [[40, 41, 42, 43]]
    for number in (1, 3, 5, 7):
        assert contents(pool, sessions[number]) == [[*range(number * 4, number * 4 + 4)]]


async def test_origins_of_a_batch_stand_in_the_order_of_its_sessions(pool: KVPool) -> None:
    """Row order is session order, then row order; the caller's table may be a slice of a larger one."""
    one = await pool.reserve(KVRequest(0, 1, batch=2, max_tokens=4), 0)
    two = await pool.reserve(KVRequest(7, 2, batch=1, max_tokens=8), 0)
    for session in (one, two):
        session.extend(session.request.max_tokens)
    buffer = torch.full((10, 6), -99, dtype=torch.int32)
    assert pool.fill_origins([two, one], buffer[4:, 2:].numpy()) == 3
    assert buffer[4, 2:4].tolist() == table(pool, two)[0].tolist()
    assert buffer[5:7, 2:3].tolist() == table(pool, one).tolist()
    assert int((buffer != -99).sum()) == 4


async def test_a_closed_session_says_so(pool: KVPool) -> None:
    """Every use after close is SessionClosed, another close is nothing, and its neighbour does not notice."""
    session = await pool.reserve(KVRequest(0, 1, batch=1, max_tokens=8), 0)
    other = await pool.reserve(KVRequest(0, 1, batch=1, max_tokens=8), 0)
    grow(pool, other, 5, mark=0)
    session.extend(5)
    session.close()
    session.close()
    for use in (
        lambda: session.extend(6),
        lambda: session.truncate(0),
        lambda: session.reorder([0]),
        lambda: session.length,
        lambda: pool.fill_origins([other, session], np.zeros((4, 4), np.int32)),
    ):
        with pytest.raises(SessionClosed):
            use()
    assert contents(pool, other) == [[0, 1, 2, 3, 4]]
    assert pool.stats().pages_mapped == 2


async def test_a_failed_fill_leaves_the_table_alone(pool: KVPool) -> None:
    """A table too small for the batch is refused before anything is written."""
    session = await pool.reserve(KVRequest(0, 1, batch=2, max_tokens=8), 0)
    session.extend(8)
    out = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(KVPoolError, match="has 1 rows, the sessions have 2"):
        pool.fill_origins([session], out.numpy())
    assert not out.any()


def test_memory_comes_when_it_is_asked_for() -> None:
    """A pool without memory says so; allocate makes two slabs of the geometry's shape."""
    geometry = KVGeometry(4, num_kv_heads=2, head_dim=3, stored=torch.bfloat16)
    pool = KVPool(geometry, 5, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(KVPoolError, match="allocate"):
        _ = pool.kv
    kv = pool.allocate()
    assert pool.kv is kv
    assert kv.k.shape == kv.v.shape == (5, 4, 2, 3)
    assert (kv.k.dtype, kv.page_tokens) == (torch.bfloat16, 4)


def test_a_geometry_of_another_dtype_is_refused() -> None:
    """Bytes that were budgeted for one dtype are not used for another."""
    pool = KVPool(KVGeometry(4, 2, 3, torch.bfloat16), 5, torch.float32, torch.device("cpu"))
    with pytest.raises(KVPoolError, match=r"pages of torch.bfloat16 are not for blocks .* in torch.float32"):
        pool.allocate()
