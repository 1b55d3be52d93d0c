"""Small sessions pass large ones within bounds, and no peer takes all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalsd._C import PagePool
from petalsd.errors import KVPoolError, OutOfPages, SessionClosed
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest
from petalsd.kvcache.spill import SpillArea
from petalsd.kvcache.waiting import AdmissionRules
from tests.kvcache.test_reserve import LONG_S, queued

FOR_EVER = 1e9


def pages(count: int, peer: str = "") -> KVRequest:
    return KVRequest(first_block=0, num_blocks=1, batch=count, max_tokens=4, peer=peer)


@pytest.fixture
def patient(make_pool: Callable[..., KVPool]) -> KVPool:
    """24 pages; who waits is passed three times, however long that takes."""
    return make_pool(25, rules=AdmissionRules(bypass_wait_s=FOR_EVER, max_bypasses=3))


async def test_small_sessions_pass_a_large_one_a_few_times(patient: KVPool) -> None:
    """They use what it cannot use yet; the fourth waits behind it, and gets its turn after it."""
    first = await patient.reserve(pages(20), 0)
    large = await queued(patient, pages(10))
    for _ in range(3):
        await patient.reserve(pages(1), 0)
    fourth = await queued(patient, pages(1))
    with pytest.raises(OutOfPages, match=r"1 of 24 are not reserved and 2 session\(s\) wait"):
        await patient.reserve(pages(1), 0)
    first.close()
    assert [(await asyncio.wait_for(task, LONG_S)).batch for task in (large, fourth)] == [10, 1]


async def test_nobody_is_passed_who_has_waited_long(make_pool: Callable[..., KVPool]) -> None:
    """With no time to be passed in, everybody is served in the order they came."""
    pool = make_pool(25, rules=AdmissionRules(bypass_wait_s=0))
    await pool.reserve(pages(20), 0)
    large = await queued(pool, pages(10))
    with pytest.raises(OutOfPages):
        await pool.reserve(pages(1), 0)
    large.cancel()


async def test_a_session_that_ends_lets_small_ones_pass(patient: KVPool) -> None:
    """What comes back goes to the first it is enough for."""
    first, second = await patient.reserve(pages(20), 0), await patient.reserve(pages(4), 0)
    large, small = await queued(patient, pages(22)), await queued(patient, pages(3))
    second.close()
    assert (await asyncio.wait_for(small, LONG_S)).batch == 3
    assert not large.done()
    first.close()
    await asyncio.sleep(0)
    assert not large.done(), "three are held by the small one"
    large.cancel()


@pytest.fixture
def shared(make_pool: Callable[..., KVPool]) -> KVPool:
    """24 pages, of which a peer may hold 18."""
    return make_pool(25, rules=AdmissionRules(max_peer_share=0.75))


async def test_a_peer_leaves_something_for_others(shared: KVPool) -> None:
    """Beyond its share it is refused with the numbers, though pages are free; others get them."""
    for _ in range(3):
        await shared.reserve(pages(6, "greedy"), 0)
    with pytest.raises(OutOfPages, match="this peer holds 18 of 24") as refusal:
        await shared.reserve(pages(1, "greedy"), 0)
    assert "close a session" in refusal.value.hint
    await shared.reserve(pages(6, "other"), 0)


async def test_one_session_may_be_larger_than_the_share(shared: KVPool) -> None:
    """A peer that holds nothing gets any session that the pool can hold."""
    session = await shared.reserve(pages(24, "lonely"), 0)
    session.close()
    await shared.reserve(pages(24, "lonely"), 0)


async def test_who_waits_for_itself_is_in_nobodys_way(make_pool: Callable[..., KVPool]) -> None:
    """A peer at its bound waits for its own sessions; those behind it are served, and that is no passing."""
    pool = make_pool(25, rules=AdmissionRules(max_peer_share=0.5, bypass_wait_s=0))
    own = await pool.reserve(pages(12, "greedy"), 0)
    waiting = await queued(pool, pages(2, "greedy"))
    for _ in range(5):
        await pool.reserve(pages(2, "other"), 0)
    own.close()
    assert (await asyncio.wait_for(waiting, LONG_S)).batch == 2


async def test_a_session_can_be_charged_to_another_peer(shared: KVPool) -> None:
    """Within that peer's share; beyond it nothing changes. Who paid until then has room again, at once."""
    session = await shared.reserve(pages(10, "giver"), 0)
    own = await shared.reserve(pages(9, "client"), 0)
    with pytest.raises(OutOfPages, match="this peer holds 9 of 24"):
        session.charge_to("client")
    waiting = await queued(shared, pages(9, "giver"))
    own.close()
    await asyncio.sleep(0)
    assert not waiting.done(), "the giver has its share still"
    session.charge_to("client")
    assert (await asyncio.wait_for(waiting, LONG_S)).batch == 9
    shared.check_integrity()
    with pytest.raises(OutOfPages, match="this peer holds 10 of 24"):
        await shared.reserve(pages(9, "client"), 0)
    session.close()
    shared.check_integrity()
    with pytest.raises(SessionClosed):
        session.charge_to("giver")


async def test_sessions_of_nobody_are_not_bounded(shared: KVPool) -> None:
    for _ in range(4):
        await shared.reserve(pages(6), 0)


async def test_the_share_is_of_all_that_can_be_promised(
    make_pool: Callable[..., KVPool], tmp_path: Path
) -> None:
    """With a spill file of 96 pages a peer may hold 72: three times the memory."""
    pool = make_pool(25, rules=AdmissionRules(max_peer_share=0.75), spill=SpillArea(tmp_path, 96 * 192, 0))
    for _ in range(3):
        await pool.reserve(pages(24, "greedy"), 0)
    with pytest.raises(OutOfPages, match="this peer holds 72 of 96"):
        await pool.reserve(pages(1, "greedy"), 0)
    await pool.reserve(pages(24, "other"), 0)


async def test_the_age_of_the_oldest_wait_is_known(patient: KVPool) -> None:
    assert patient.stats().oldest_wait_s == 0
    await patient.reserve(pages(24), 0)
    task = await queued(patient, pages(1))
    assert 0 < patient.stats().oldest_wait_s < LONG_S
    task.cancel()


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(KVPoolError, match="max_peer_share"):
        PagePool(25, 4, max_peer_share=share)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    asked=st.lists(st.tuples(st.integers(1, 24), st.sampled_from(["a", "b", ""])), min_size=1, max_size=40),
    max_bypasses=st.integers(0, 4),
)
def test_everybody_is_served_in_the_end(asked: list[tuple[int, str]], max_bypasses: int) -> None:
    """However requests queue up: as sessions end, each gets its turn, and none is passed too often."""
    pool = PagePool(25, 4, max_peer_share=0.5, bypass_wait_s=FOR_EVER, max_bypasses=max_bypasses)
    waiting: dict[int, tuple[int, str]] = {}
    passed: dict[int, int] = {}
    open_sessions: list[int] = []

    def collect() -> None:
        for handle in pool.granted():
            for earlier in waiting:
                if earlier < handle:
                    passed[earlier] += 1
            del waiting[handle]
            open_sessions.append(handle)

    for rows, peer in asked:
        handle = pool.request(0, 1, rows, 4, peer)
        waiting[handle], passed[handle] = (rows, peer), 0
        collect()
    while open_sessions:
        pool.close(open_sessions.pop(0))
        collect()
        pool.check_integrity()
    assert not waiting
    assert all(count <= max_bypasses for handle, count in passed.items() if asked[handle - 1][1] == "")
