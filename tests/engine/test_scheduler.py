"""The scheduler's promises, on integers alone: budget, decode first, chunks, fairness per peer, no starvation."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalsd.engine.chunk_policy import DECODE_MEMORY_S
from petalsd.engine.fair_queue import Job
from petalsd.engine.iteration_cost import AttentionShare
from petalsd.engine.scheduler import PASS_PERIOD, Plan, Scheduler

BUDGET, CHUNK = 16, 5

jobs = st.tuples(
    st.sampled_from("abcd"),  # peer
    st.integers(1, CHUNK),  # rows
    st.one_of(st.just(1), st.integers(1, 60)),  # tokens
    st.integers(1, 4),  # blocks
)
arrivals = st.lists(st.lists(jobs, max_size=4), max_size=25)


def cost(plan: Plan, rows: dict[int, int]) -> int:
    return sum(piece.tokens * rows[piece.key] for piece in plan.slices)


class Run:
    """Drives a scheduler and checks each plan against what was handed in."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(BUDGET, CHUNK)
        self.rows: dict[int, int] = {}
        self.peers: dict[int, str] = {}
        self.left: dict[int, int] = {}
        self.finished: list[int] = []

    def add(self, peer: str, rows: int, tokens: int, blocks: int = 1) -> int:
        key = len(self.rows)
        self.scheduler.add(Job(key, peer, rows, tokens, blocks))
        self.rows[key], self.left[key], self.peers[key] = rows, tokens, peer
        return key

    def remove(self, key: int) -> None:
        self.scheduler.remove(key)
        self.left.pop(key, None)

    def plan(self, now: float = 0.0) -> Plan:
        plan = self.scheduler.schedule(now)
        assert cost(plan, self.rows) <= BUDGET
        assert len({piece.key for piece in plan.slices}) == len(plan.slices), "a job is planned twice"
        assert bool(plan.slices) == bool(self.left), "work waits and nothing is planned, or the reverse"
        for key, tokens, is_last in plan.slices:
            assert 0 < tokens <= self.left[key]
            self.left[key] -= tokens
            assert is_last == (self.left[key] == 0)
            if is_last:
                del self.left[key]
                self.finished.append(key)
        assert len(self.scheduler) == len(self.left)
        return plan

    def drain(self) -> None:
        while self.left:
            self.plan()


@settings(deadline=None, max_examples=60)
@given(arrivals, st.lists(st.integers(0, 40), max_size=10))
def test_every_job_is_computed_once_within_the_budget(
    waves: list[list[tuple[str, int, int, int]]], removed: list[int]
) -> None:
    """Whatever comes and goes, plans stay in the budget, each job gets exactly its tokens, and all finish."""
    run = Run()
    gone = set()
    for wave, key in zip(waves, removed + [-1] * len(waves), strict=False):
        for job in wave:
            run.add(*job)
        if key in run.left:
            run.remove(key)
            gone.add(key)
        run.plan()
    run.drain()
    assert sorted(run.finished) == sorted(set(run.rows) - gone)


@settings(deadline=None, max_examples=60)
@given(arrivals)
def test_decode_goes_first(waves: list[list[tuple[str, int, int, int]]]) -> None:
    """Decode comes first in the plan, and only waits if it does not fit beside a chunk's worth of prefill.

    Or behind one of its peer that does not.
    """
    run = Run()
    for wave in waves:
        for job in wave:
            run.add(*job)
        decoding = {key for key, tokens in run.left.items() if tokens == 1}
        slices = run.plan().slices
        kinds = [piece.key in decoding for piece in slices]
        assert kinds == sorted(kinds, reverse=True)
        planned = {piece.key for piece in slices}
        used = sum(run.rows[piece.key] for piece in slices if piece.key in decoding)
        largest: Counter[str] = Counter()
        for key in decoding - planned:
            largest[run.peers[key]] = max(largest[run.peers[key]], run.rows[key])
        assert all(used + rows > BUDGET - CHUNK for rows in largest.values())


@settings(deadline=None, max_examples=60)
@given(st.lists(jobs, min_size=1, max_size=30), jobs)
def test_nobody_starves(crowd: list[tuple[str, int, int, int]], patient: tuple[str, int, int, int]) -> None:
    """A job is done after a bounded number of iterations although others refill the queue all the time."""
    run = Run()
    for job in crowd:
        run.add(*job)
    _, rows, tokens, blocks = patient
    key = run.add("patient", rows, tokens, blocks)
    num_peers = 5
    rounds = 4 + num_peers * (2 + tokens * rows * max(blocks, 4)) * 4
    for round_number in range(rounds):
        run.plan()
        if key not in run.left:
            return
        if len(run.left) < 30:
            run.add(*crowd[round_number % len(crowd)])
    pytest.fail(f"the job has {run.left[key]} of {tokens} tokens left after {rounds} iterations")


def test_a_stream_of_new_peers_does_not_starve_an_old_one() -> None:
    """A peer that was given much is still served while every competitor is new."""
    run = Run()
    run.add("old", 5, 40)
    for _ in range(20):
        run.plan()
    key = run.add("old", 5, 20)
    for number in range(200):
        run.add(f"new-{number}", 5, 3)
        run.plan()
        if key not in run.left:
            return
    pytest.fail("the old peer starved")


@pytest.mark.parametrize("tokens", [1, 50], ids=["decode", "prefill"])
def test_peers_share_equally(tokens: int) -> None:
    """One session gets as much as ten of another peer together, when there is more work than budget."""
    run = Run()
    given_to: Counter[str] = Counter()
    peer_of = {}
    waiting: dict[str, int] = defaultdict(int)
    wanted = {"one": 1, "many": 10}
    for _ in range(200):
        for peer, count in wanted.items():
            while waiting[peer] < count:
                peer_of[run.add(peer, CHUNK, tokens)] = peer
                waiting[peer] += 1
        for piece in run.plan().slices:
            given_to[peer_of[piece.key]] += piece.tokens
            waiting[peer_of[piece.key]] -= piece.is_last
    if tokens == 1:  # one session can use one row set per iteration at most, and gets it every time
        assert given_to["one"] == 200
    else:
        assert abs(given_to["one"] - given_to["many"]) <= 50


def test_the_blocks_count() -> None:
    """A peer whose jobs run through four times the blocks gets a quarter of the tokens."""
    run = Run()
    given_to: Counter[int] = Counter()
    light, heavy = run.add("light", 1, 10_000, 1), run.add("heavy", 1, 10_000, 4)
    for _ in range(100):
        for piece in run.plan().slices:
            given_to[piece.key] += piece.tokens
    assert given_to[light] == pytest.approx(4 * given_to[heavy], rel=0.1)


def test_a_lone_prefill_uses_the_whole_budget() -> None:
    """While nobody decodes, prefill is cut by the budget, not by the chunk."""
    run = Run()
    run.add("a", 1, 40)
    assert [run.plan().slices[0].tokens for _ in range(3)] == [16, 16, 8]


def test_prefill_stays_small_for_a_while_after_a_decode() -> None:
    """A decode keeps prefill to chunks for some time, because its client comes back soon."""
    scheduler = Scheduler(max_batch_tokens=1024, chunk_tokens=256)
    scheduler.add(Job(0, "a", 1, 1))
    scheduler.schedule(10.0)
    scheduler.ran(0.01)
    scheduler.add(Job(1, "b", 1, 10_000))
    sizes = [scheduler.schedule(10.0 + part * DECODE_MEMORY_S).slices[0].tokens for part in (0.5, 0.99, 1.01)]
    assert sizes[0] == sizes[1] < 100
    assert sizes[2] == 1024


def test_what_takes_no_time_is_not_cut() -> None:
    """Nobody would notice twice a decode of half a millisecond: prompts go on in larger chunks."""
    sizes = []
    for decode_s in (0.0005, 0.01):
        scheduler = Scheduler(max_batch_tokens=1024, chunk_tokens=256)
        scheduler.add(Job(0, "a", 1, 1))
        scheduler.schedule(10.0)
        scheduler.ran(decode_s)
        scheduler.add(Job(1, "b", 1, 10_000))
        sizes.append(scheduler.schedule(10.5).slices[0].tokens)
    assert sizes[0] > 5 * sizes[1]


def test_passes_wait_but_not_for_ever() -> None:
    """A pass gets its turn at once when no steps wait, and every few iterations while they do."""
    scheduler = Scheduler(BUDGET, CHUNK)
    assert scheduler.schedule(0.0, has_pass=True) == Plan([], math.inf)
    turns = []
    for key in range(4 * PASS_PERIOD):
        scheduler.add(Job(key, "a", 1, 1))
        turns.append(scheduler.schedule(0.0, has_pass=True).pass_s is not None)
    assert turns == ([False] * (PASS_PERIOD - 1) + [True]) * 4
    assert scheduler.schedule(0.0) == Plan([], None)


def test_a_pass_takes_the_turn_of_a_prefill() -> None:
    """The iteration before it has no chunk in it, so a decode step waits for one of the two only."""
    scheduler = Scheduler(BUDGET, CHUNK)
    scheduler.add(Job(-1, "b", 1, 10_000))
    for key in range(2 * PASS_PERIOD):
        scheduler.add(Job(key, "a", 1, 1))
        plan = scheduler.schedule(0.0, has_pass=True)
        scheduler.ran(0.01)
        if plan.pass_s is not None:
            assert [piece.key for piece in plan.slices] == [key]
            assert 0 < plan.pass_s <= 0.01


def test_nothing_measured_bounds_nothing() -> None:
    """Before the first measurement there are no seconds to count with: a pass gets one unit at a time."""
    scheduler = Scheduler(BUDGET, CHUNK)
    scheduler.add(Job(0, "a", 1, 1))
    assert scheduler.schedule(0.0).slices
    assert scheduler.undisturbed_s == 0.0
    assert scheduler.schedule(0.0, has_pass=True) == Plan([], math.inf)


@pytest.mark.parametrize(("rows", "tokens", "blocks"), [(0, 1, 1), (CHUNK + 1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_jobs_that_can_never_run_are_refused(rows: int, tokens: int, blocks: int) -> None:
    """A job without rows, tokens or blocks, or with more rows than a chunk, is a mistake of the caller."""
    with pytest.raises(ValueError, match="cannot schedule"):
        Scheduler(BUDGET, CHUNK).add(Job(0, "a", rows, tokens, blocks))


def test_a_key_is_taken_until_its_job_ends() -> None:
    """The same key twice is a mistake; removing or finishing the job frees it."""
    scheduler = Scheduler(BUDGET, CHUNK)
    scheduler.add(Job(0, "a", 1, 9))
    with pytest.raises(ValueError, match="already queued"):
        scheduler.add(Job(0, "a", 1, 1))
    scheduler.remove(0)
    scheduler.remove(0)
    scheduler.add(Job(0, "a", 1, 1))
    scheduler.schedule(0.0)
    scheduler.add(Job(0, "a", 1, 1))


def test_tokens_behind_many_others_cost_more() -> None:
    """Where attention makes a token four times as dear, a peer gets a quarter of the tokens."""
    scheduler = Scheduler(BUDGET, CHUNK, AttentionShare(pair=0.0001))
    scheduler.add(Job(0, "short", 1, 10_000))
    scheduler.add(Job(1, "long", 1, 10_000, context=30_000))
    given_to: Counter[int] = Counter()
    for _ in range(100):
        for piece in scheduler.schedule(0.0).slices:
            given_to[piece.key] += piece.tokens
    assert given_to[0] == pytest.approx(4 * given_to[1], rel=0.2)


def test_a_chunk_must_leave_room_for_decode() -> None:
    """A chunk of more than half the budget is refused: a turn would not always fit."""
    with pytest.raises(ValueError, match="twice"):
        Scheduler(16, 9)
