"""Waiting for pages: in order, with a deadline, and without losing any."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable

import pytest

from petalsd.errors import Draining, OutOfPages
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.session import KVRequest, KVSession
from petalsd.kvcache.waiting import AdmissionRules

LONG_S = 30.0


def rows(batch: int, peer: str = "") -> KVRequest:
    """One page per row, in one block."""
    return KVRequest(first_block=0, num_blocks=1, batch=batch, max_tokens=4, peer=peer)


async def queued(pool: KVPool, request: KVRequest, timeout_s: float = LONG_S) -> asyncio.Task[KVSession]:
    """A task that stands in the queue."""
    before = pool.stats().waiters
    task = asyncio.create_task(pool.reserve(request, timeout_s))
    await asyncio.sleep(0)
    assert pool.stats().waiters == before + 1
    return task


async def test_a_session_with_room_opens_at_once(pool: KVPool) -> None:
    """With and without a timeout, a reservation that fits does not wait."""
    for timeout_s in (0, LONG_S):
        session = await pool.reserve(rows(10), timeout_s)
        assert (session.batch, session.length) == (10, 0)
    assert pool.tokens_free == (24 - 20) * 4


async def test_no_time_means_no_wait(pool: KVPool) -> None:
    """With timeout 0 the refusal comes at once, with the numbers and what to do."""
    await pool.reserve(rows(20), 0)
    with pytest.raises(OutOfPages, match=r"needs 10 pages .*, 4 of 24 are not reserved") as refusal:
        await pool.reserve(rows(10), 0)
    assert "retry later" in refusal.value.hint
    assert pool.stats().waiters == 0


async def test_what_never_fits_does_not_wait(pool: KVPool) -> None:
    """A session larger than the pool is refused at once, whatever its timeout."""
    with pytest.raises(OutOfPages, match="more than all 24 pages"):
        await pool.reserve(rows(25), LONG_S)


async def test_the_deadline_ends_the_wait(pool: KVPool) -> None:
    """A wait that ran out names its length, and leaves the queue to the others."""
    first = await pool.reserve(rows(20), 0)
    with pytest.raises(
        OutOfPages, match=r"10 row\(s\) of 4 tokens in 1 block\(s\)\) got no pages within 0.02 s"
    ):
        await pool.reserve(rows(10), 0.02)
    await pool.reserve(rows(4), 0)
    first.close()
    assert pool.stats().pages_reserved == 4


async def test_closing_on_another_thread_wakes_the_waiter(pool: KVPool) -> None:
    """The engine thread closes a session, and the task on the loop gets its pages."""
    first = await pool.reserve(rows(20), 0)
    task = await queued(pool, rows(10))
    closer = threading.Thread(target=first.close)
    closer.start()
    session = await asyncio.wait_for(task, LONG_S)
    closer.join()
    assert session.batch == 10
    assert pool.stats().pages_reserved == 10


async def test_a_cancelled_wait_gives_its_place_back(pool: KVPool) -> None:
    """Who stood behind a cancelled request moves up."""
    await pool.reserve(rows(20), 0)
    large, small = await queued(pool, rows(10)), await queued(pool, rows(4))
    large.cancel()
    assert (await asyncio.wait_for(small, LONG_S)).batch == 4
    assert pool.stats().pages_reserved == 24


async def test_a_wait_cancelled_after_its_grant_gives_the_pages_back(pool: KVPool) -> None:
    """Granted and cancelled in the same turn of the loop: nobody holds the pages."""
    first = await pool.reserve(rows(20), 0)
    task = await queued(pool, rows(10))
    first.close()  # granted: the task would wake in the next turn
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.stats().pages_reserved == 0


async def test_the_queue_is_bounded(make_pool: Callable[..., KVPool]) -> None:
    """One waiter more than max_waiters is turned away at once."""
    pool = make_pool(25, rules=AdmissionRules(max_waiters=2))
    await pool.reserve(rows(24), 0)
    tasks = [await queued(pool, rows(1)) for _ in range(2)]
    with pytest.raises(OutOfPages, match="2 sessions wait for pages already"):
        await pool.reserve(rows(1), LONG_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_peer_has_half_of_the_queue(make_pool: Callable[..., KVPool]) -> None:
    """Another one still waits when a peer has sent more than its half, and is turned away."""
    pool = make_pool(25, rules=AdmissionRules(max_waiters=4))
    await pool.reserve(rows(24), 0)
    tasks = [await queued(pool, rows(1, peer="greedy")) for _ in range(2)]
    with pytest.raises(OutOfPages, match="2 sessions wait for pages already, 2 of them yours"):
        await pool.reserve(rows(1, peer="greedy"), LONG_S)
    tasks.append(await queued(pool, rows(1, peer="modest")))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_waiters_are_served_in_the_order_they_came(pool: KVPool) -> None:
    """Nobody passes anybody, so everyone is served once those before it are: no request can starve."""
    rng = random.Random(0)
    served: list[int] = []
    held = [await pool.reserve(rows(8), 0) for _ in range(3)]

    async def wait(number: int, batch: int) -> None:
        held.append(await pool.reserve(rows(batch), LONG_S))
        served.append(number)

    tasks = []
    for number in range(40):
        tasks.append(asyncio.create_task(wait(number, rng.choice([1, 2, 23, 24]))))
        await asyncio.sleep(0)
    while len(served) < 40:
        if held:
            held.pop(rng.randrange(len(held))).close()
        pool.check_integrity()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert served == list(range(40))


async def test_dismissed_waiters_learn_why(pool: KVPool) -> None:
    """All waits end with the given error, the queue is empty, open sessions stay."""
    await pool.reserve(rows(24), 0)
    tasks = [await queued(pool, rows(1)) for _ in range(3)]
    pool.dismiss_waiters(Draining("the span moves"))
    for task in tasks:
        with pytest.raises(Draining, match="the span moves"):
            await task
    assert (pool.stats().waiters, pool.stats().sessions) == (0, 1)


def test_a_grant_to_a_loop_that_is_gone_passes_on(pool: KVPool) -> None:
    """Pages granted to a task whose event loop was closed under it go back to the pool."""
    loop = asyncio.new_event_loop()
    first = loop.run_until_complete(pool.reserve(rows(24), 0))
    task = loop.run_until_complete(queued(pool, rows(10)))
    loop.close()
    first.close()
    assert pool.stats().pages_reserved == 0
    task.get_coro().close()
    task._log_destroy_pending = False  # it was abandoned on purpose


async def test_clients_come_and_go_beside_the_engine(pool: KVPool) -> None:
    """Tasks reserve, wait and give up while another thread extends and closes; in the end nothing is held."""
    work: list[KVSession | None] = []
    ready = threading.Condition()

    def engine() -> None:
        rng = random.Random(1)
        while True:
            with ready:
                ready.wait_for(lambda: work)
                session = work.pop(0)
            if session is None:
                return
            for length in range(session.length, rng.randint(0, 4) + 1):
                session.extend(length)
            pool.apply_copies()
            session.close()

    async def client(number: int) -> bool:
        try:
            session = await pool.reserve(rows(1 + number % 9), 0.001 if number % 5 == 0 else LONG_S)
        except OutOfPages:
            return False
        with ready:
            work.append(session)
            ready.notify()
        return True

    thread = threading.Thread(target=engine)
    thread.start()
    outcomes: list[bool] = []
    for _ in range(20):
        outcomes += await asyncio.gather(*(client(number) for number in range(40)))
        pool.check_integrity()
    with ready:
        work.append(None)
        ready.notify()
    await asyncio.to_thread(thread.join)
    assert outcomes.count(True) >= 20 * 32
    stats = pool.stats()
    assert (stats.pages_reserved, stats.pages_mapped, stats.sessions, stats.waiters) == (0, 0, 0, 0)
