"""Who gets pages when: credit, the queue, and what a wrong call is told."""

from __future__ import annotations

import numpy as np
import pytest

from petalsd._C import PagePool
from petalsd.errors import KVPoolError, OutOfPages, SessionClosed


@pytest.fixture
def pool() -> PagePool:
    """24 pages of 4 tokens; nobody passes anybody."""
    return PagePool(25, 4, bypass_wait_s=0)


def test_credit_counts_rows_runs_and_blocks(pool: PagePool) -> None:
    """A session is promised pages for every row, every started run and its own blocks only."""
    pool.try_open(7, 3, 2, 9)
    stats = pool.stats()
    assert (stats.pages_reserved, stats.pages_mapped, stats.pages_free) == (3 * 2 * 3, 0, 24)


def test_pages_are_taken_as_tokens_come(pool: PagePool) -> None:
    """Opening maps nothing; each started run maps one page per row and block."""
    session = pool.try_open(0, 2, 1, 12)
    mapped = []
    for length in (0, 1, 4, 5, 12):
        pool.extend(session, length)
        mapped.append(pool.stats().pages_mapped)
    assert mapped == [0, 2, 2, 4, 6]
    pool.truncate(session, 4)
    assert (pool.stats().pages_mapped, pool.stats().high_water) == (2, 6)


def test_requests_are_granted_in_the_order_they_came(pool: PagePool) -> None:
    """A small request does not pass a large one that waits before it."""
    first = pool.try_open(0, 1, 1, 80)  # 20 pages
    large, small = pool.request(0, 1, 1, 40), pool.request(0, 1, 1, 4)
    assert pool.granted() == []
    pool.close(first)
    assert pool.granted() == [large, small]


def test_nobody_opens_past_the_queue(pool: PagePool) -> None:
    """try_open is refused while others wait, even if its own pages are there."""
    pool.try_open(0, 1, 1, 80)
    waiting = pool.request(0, 1, 1, 40)
    with pytest.raises(OutOfPages, match=r"1 session\(s\) wait"):
        pool.try_open(0, 1, 1, 4)
    pool.close(waiting)
    pool.try_open(0, 1, 1, 4)


def test_withdrawing_the_head_lets_the_next_in(pool: PagePool) -> None:
    """The queue goes on at once when the request that blocked it is withdrawn."""
    pool.try_open(0, 1, 1, 80)
    large, small = pool.request(0, 1, 1, 40), pool.request(0, 1, 1, 4)
    pool.close(large)
    assert pool.granted() == [small]
    assert pool.stats().waiters == 0


def test_withdrawing_a_granted_request_returns_its_credit(pool: PagePool) -> None:
    """A request closed between its grant and the question who was granted is not named, and its pages are free."""
    session = pool.request(0, 1, 1, 96)
    pool.close(session)
    assert pool.granted() == []
    assert pool.stats().pages_reserved == 0


def test_closing_twice_is_closing_once(pool: PagePool) -> None:
    """The second close of a handle takes nothing from anyone."""
    first = pool.try_open(0, 1, 1, 48)
    pool.close(first)
    second = pool.try_open(0, 1, 1, 48)
    pool.close(first)
    assert pool.stats().pages_reserved == 12
    pool.extend(second, 48)
    pool.check_integrity()


@pytest.mark.parametrize("shape", [(0, 25, 1, 1), (0, 1, 25, 1), (0, 1, 1, 97), (0, 2**40, 2**40, 2**62)])
def test_what_never_fits_is_refused_at_once(pool: PagePool, shape: tuple[int, int, int, int]) -> None:
    """A session larger than the whole pool never waits, however large its numbers."""
    with pytest.raises(OutOfPages, match="more than all 24 pages") as refusal:
        pool.request(*shape)
    assert refusal.value.hint
    with pytest.raises(OutOfPages, match="more than all 24 pages"):
        pool.try_open(*shape)
    assert pool.stats().waiters == 0


@pytest.mark.parametrize("shape", [(-1, 1, 1, 1), (2**31, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)])
def test_a_session_has_blocks_rows_and_tokens(pool: PagePool, shape: tuple[int, int, int, int]) -> None:
    """A shape that is no session is a bug of the caller."""
    with pytest.raises(KVPoolError, match=r"page_pool\.cpp:\d+: first_block = "):
        pool.try_open(*shape)


@pytest.mark.parametrize(("num_pages", "page_tokens"), [(1, 16), (-5, 16), (2**31, 16), (8, 0)])
def test_a_pool_has_pages_and_a_page_has_tokens(num_pages: int, page_tokens: int) -> None:
    """Impossible pools are refused before any memory is taken."""
    with pytest.raises(KVPoolError, match=r"num_pages|page_tokens"):
        PagePool(num_pages, page_tokens)


def test_calls_against_the_contract_change_nothing(pool: PagePool) -> None:
    """Lengths and hypo_ids out of range raise with the numbers, and the session goes on."""
    session = pool.try_open(0, 1, 2, 8)
    pool.extend(session, 5)
    for call in (
        lambda: pool.extend(session, 9),
        lambda: pool.extend(session, 4),
        lambda: pool.truncate(session, 6),
        lambda: pool.truncate(session, -1),
        lambda: pool.reorder(session, [0]),
        lambda: pool.reorder(session, [0, 2]),
        lambda: pool.reorder(session, [-1, 0]),
        lambda: pool.take_copies(0),
    ):
        with pytest.raises(KVPoolError, match=r"^kv_pool_error: \w+\.cpp:\d+: "):
            call()
        pool.check_integrity()
        assert pool.length(session) == 5


def test_handles_are_told_apart(pool: PagePool) -> None:
    """A closed handle, one that waits and one that never was are different mistakes."""
    closed, first = pool.try_open(0, 1, 1, 4), pool.try_open(0, 1, 1, 80)
    pool.close(closed)
    waiting = pool.request(0, 1, 1, 40)
    with pytest.raises(SessionClosed):
        pool.extend(closed, 1)
    with pytest.raises(KVPoolError, match="still waits"):
        pool.extend(waiting, 1)
    with pytest.raises(KVPoolError, match="never given out"):
        pool.extend(first + 100, 1)
    with pytest.raises(KVPoolError, match="never given out"):
        pool.close(first + 100)


def test_origins_point_to_distinct_runs_of_the_sessions_blocks(pool: PagePool) -> None:
    """Rows of all sessions stand in order, and origin + block is a page that nobody else has."""
    sessions = [pool.try_open(5, 2, 2, 8), pool.try_open(0, 3, 1, 8)]
    pool.extend(sessions[0], 8)
    pool.extend(sessions[1], 3)
    out = np.full((4, 3), -77, dtype=np.int32)
    assert pool.fill_origins(sessions, out) == 3
    pages = [out[row, run] + block for row in (0, 1) for run in (0, 1) for block in (5, 6)]
    pages += [out[2, 0] + block for block in range(3)]
    assert len(set(pages)) == 11
    assert min(pages) >= 1
    assert max(pages) <= 24
    assert (out[:2, 2] == -77).all()
    assert (out[2, 1:] == -77).all()
    assert (out[3] == -77).all()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((1, 2), np.int32),
        np.zeros((2, 1), np.int32),
        np.zeros((2, 2), np.int64),
        np.zeros((2, 2), np.float32),
        np.zeros(4, np.int32),
        np.zeros((2, 2), np.int32).T,
        np.broadcast_to(np.zeros(2, np.int32), (2, 2)),
    ],
    ids=["rows", "columns", "int64", "float", "1-d", "transposed", "broadcast"],
)
def test_a_table_that_does_not_fit_is_refused(pool: PagePool, out: np.ndarray) -> None:
    """fill_origins writes only into an int32 table with room for every row and run."""
    session = pool.try_open(0, 1, 2, 8)
    pool.extend(session, 8)
    with pytest.raises((KVPoolError, ValueError, BufferError)):
        pool.fill_origins([session], out)
    assert not out.any()


def test_a_wider_table_is_filled_by_its_stride(pool: PagePool) -> None:
    """A slice of a larger table is written without touching its neighbours."""
    session = pool.try_open(0, 1, 2, 8)
    pool.extend(session, 8)
    table = np.zeros((2, 10), np.int32)
    pool.fill_origins([session], table[:, 3:5])
    assert (table[:, 3:5] > 0).all()
    assert not table[:, :3].any()
    assert not table[:, 5:].any()
