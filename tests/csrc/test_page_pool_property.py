"""The C++ pool against the Python model: any sequence of calls, the same books and the same contents."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from petalsd.errors import OutOfPages
from tests.csrc.pool_model import FakeEngine, ModelSession, Shape
from tests.tiers import nightly_except

shapes = st.builds(
    Shape,
    first_block=st.integers(0, 3),
    num_blocks=st.integers(1, 5),
    batch=st.integers(1, 3),
    max_tokens=st.integers(1, 12),
)


class PagePoolMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(2, 60), page_tokens=st.integers(1, 4), times=st.sampled_from([0, 1.5, 8])
    )
    def start(self, num_pages: int, page_tokens: int, times: float) -> None:
        self.engine = FakeEngine(num_pages, page_tokens, spill_pages=int(times * num_pages))

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.engine.open)), label="session")

    def draw_count(self, data: st.DataObject, handle: int) -> int:
        session = self.engine.open[handle]
        return data.draw(st.integers(0, session.shape.max_tokens - session.length), label="tokens")

    @rule(shape=shapes)
    def request(self, shape: Shape) -> None:
        if ModelSession(shape, self.engine.page_tokens).credit > self.engine.num_pages:
            with pytest.raises(OutOfPages):
                self.engine.request(shape)
        else:
            self.engine.request(shape)

    @rule(shape=shapes)
    def try_open(self, shape: Shape) -> None:
        credit = ModelSession(shape, self.engine.page_tokens).credit
        if credit <= min(self.engine.num_pages, self.engine.unreserved) and not self.engine.waiting:
            self.engine.try_open(shape)
        else:
            with pytest.raises(OutOfPages):
                self.engine.try_open(shape)

    @precondition(lambda self: self.engine.open)
    @rule(data=st.data(), copy_limit=st.integers(1, 20))
    def step(self, data: st.DataObject, copy_limit: int) -> None:
        handles = data.draw(st.sets(st.sampled_from(sorted(self.engine.open))), label="sessions")
        self.engine.step({handle: self.draw_count(data, handle) for handle in sorted(handles)}, copy_limit)

    @precondition(lambda self: self.engine.open)
    @rule(data=st.data())
    def abandon_step(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        self.engine.abandoned_step(handle, self.draw_count(data, handle))

    @precondition(lambda self: self.engine.open)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        self.engine.truncate(
            handle, data.draw(st.integers(0, self.engine.open[handle].length), label="length")
        )

    @precondition(lambda self: self.engine.open)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        batch = self.engine.open[handle].shape.batch
        row = st.integers(0, batch - 1)
        self.engine.reorder(
            handle, data.draw(st.lists(row, min_size=batch, max_size=batch), label="hypo_ids")
        )

    @precondition(lambda self: self.engine.open)
    @rule(data=st.data())
    def overwrite(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        session = self.engine.open[handle]
        if session.length and not session.is_shared:
            start = data.draw(st.integers(0, session.length - 1), label="start")
            end = data.draw(st.integers(start + 1, session.length), label="end")
            self.engine.overwrite(handle, start, end)

    @precondition(lambda self: self.engine.open or self.engine.waiting)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        handles = sorted([*self.engine.open, *self.engine.waiting])
        self.engine.close(data.draw(st.sampled_from(handles), label="session"))

    @precondition(lambda self: self.engine.open)
    @rule(data=st.data(), peer=st.sampled_from(["", "one", "other"]))
    def charge(self, data: st.DataObject, peer: str) -> None:
        self.engine.pool.charge(self.pick(data), peer)

    @rule()
    def read_all(self) -> None:
        self.engine.check_contents()

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_books()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_contents()
        for handle in [*self.engine.waiting, *self.engine.open]:
            self.engine.close(handle)
        stats = self.engine.pool.stats()
        assert (stats.pages_mapped, stats.pages_reserved, stats.sessions, stats.waiters) == (0, 0, 0, 0)


class TestAnySequence(PagePoolMachine.TestCase):
    settings = settings(max_examples=80, stateful_step_count=50, deadline=None, derandomize=True)


def random_shape(rng: random.Random) -> Shape:
    return Shape(rng.randrange(4), rng.randint(1, 12), rng.randint(1, 3), rng.randint(1, 20))


def random_call(engine: FakeEngine, rng: random.Random) -> None:
    session = rng.choice(list(engine.open)) if engine.open else None
    has_file = engine.capacity > engine.num_pages  # else nothing could be out of date
    kinds = ["open", "step", "abandon", "truncate", "reorder", "overwrite", "close"]
    match rng.choices(kinds, [10, 16, 1, 1, 2, has_file, 2])[0]:
        case "open":
            if len(engine.waiting) < 2:
                engine.request(random_shape(rng))
        case _ if session is None:
            return
        case "step":
            batch = rng.sample(list(engine.open), rng.randint(1, len(engine.open)))
            engine.step(
                {handle: rng.randint(0, room(engine, handle)) for handle in batch}, rng.choice([1, 3, 1000])
            )
        case "abandon":
            engine.abandoned_step(session, rng.randint(0, room(engine, session)))
        case "truncate":
            engine.truncate(session, rng.randint(0, engine.open[session].length))
        case "reorder":
            batch_size = engine.open[session].shape.batch
            engine.reorder(session, rng.choices(range(batch_size), k=batch_size))
        case "overwrite":
            if engine.open[session].length and not engine.open[session].is_shared:
                start = rng.randrange(engine.open[session].length)
                engine.overwrite(session, start, rng.randint(start + 1, engine.open[session].length))
        case "close":
            engine.close(rng.choice([*engine.open, *engine.waiting]))


def room(engine: FakeEngine, handle: int) -> int:
    session = engine.open[handle]
    return min(4, session.shape.max_tokens - session.length)


def live(engine: FakeEngine, seed: int) -> None:
    """1500 random calls, the books and the contents checked all the way."""
    rng = random.Random(seed)
    for _ in range(1500):
        random_call(engine, rng)
        engine.check_books()
        if rng.random() < 0.1:
            engine.check_contents()
    engine.check_contents()


@pytest.mark.parametrize("seed", range(4))
def test_a_long_crowded_life_keeps_every_row_its_tokens(seed: int) -> None:
    """A small pool that is always full copies, moves and reuses pages, and no row ever reads another's tokens."""
    engine = FakeEngine(num_pages=400, page_tokens=3)
    live(engine, seed)
    stats = engine.pool.stats()
    assert stats.pages_moved > 10, "the pool hardly had to move runs: the test is too easy"
    assert stats.copies - stats.pages_moved > 10, "the pool hardly copied on write: the test is too easy"


@pytest.mark.parametrize("seed", nightly_except(range(4), 0))
def test_a_life_beyond_the_memory_keeps_every_row_its_tokens(seed: int) -> None:
    """With five times the memory promised, pages go to the file and come back, shared runs among them."""
    engine = FakeEngine(num_pages=300, page_tokens=3, spill_pages=1500)
    live(engine, seed)
    stats = engine.pool.stats()
    assert stats.pages_restored > 1000, "hardly anything came back: the test is too easy"
    assert stats.copies - stats.pages_moved > 10, "the pool hardly copied on write: the test is too easy"
