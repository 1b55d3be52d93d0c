"""How many blocks servers keep: against trying all, in turns, and never at somebody's cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement.decision import Decision, MoveCosts, OwnSpan, Verdict, decide
from petalsd.swarm.placement.lengths import Lengths, read_lengths, wishing, with_lengths
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import scale, soft_minimum
from petalsd.swarm.placement.reading import read_state
from petalsd.swarm.placement.state import SwarmState
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan
from tests.swarm.placement.swarms import state_of

POLICY, COSTS = Policy(), MoveCosts(margin=4 / 3)
NUM_BLOCKS = 24
ENDLESS = 1e9  # tokens/s of a link that bounds nobody


class Fleet:
    """Servers with rates, and where each of them stands."""

    def __init__(self, lengths: list[Lengths], spans: list[BlockSpan], num_blocks: int = NUM_BLOCKS) -> None:
        self.lengths, self.spans, self.num_blocks = lengths, spans, num_blocks

    @classmethod
    def random(cls, seed: int, servers: int = 8, network_rps: float = ENDLESS) -> Fleet:
        rng = np.random.default_rng(seed)
        longest = rng.integers(3, NUM_BLOCKS // 2, servers)
        start = rng.integers(0, NUM_BLOCKS - longest + 1)
        rates = rng.lognormal(3.0, 0.5, servers)
        return cls(
            [Lengths(int(n), float(rate), network_rps) for n, rate in zip(longest, rates, strict=True)],
            [BlockSpan(int(at), int(at + n)) for at, n in zip(start, longest, strict=True)],
        )

    @property
    def state(self) -> SwarmState:
        rates = [one.throughput(len(span)) for one, span in zip(self.lengths, self.spans, strict=True)]
        spans = [(span.start, span.end, rate) for span, rate in zip(self.spans, rates, strict=True)]
        return state_of(self.num_blocks, *spans)

    @property
    def weakest(self) -> float:
        return float(self.state.planned_cover().min())

    def decision(self, row: int, served_s: float = 1e9, costs: MoveCosts = COSTS) -> Decision:
        state = self.state
        own = OwnSpan(state.peers[row], self.spans[row], served_s)
        return with_lengths(decide(state, own, costs, POLICY), state, self.lengths, own, costs, POLICY)

    def all_at_once(self) -> int:
        """Everybody decides on the same view and acts; how many did."""
        decisions = [self.decision(row) for row in range(len(self.spans))]
        self.spans = [one.target if one.is_move else one.span for one in decisions]
        return sum(one.is_move for one in decisions)


def overlapping(network_rps: float = ENDLESS) -> Fleet:
    """Both could hold all but two of the blocks; the first overlaps with the second, which is much faster."""
    lengths = [Lengths(6, 10.0, network_rps), Lengths(6, 40.0, network_rps)]
    return Fleet(lengths, [BlockSpan(0, 6), BlockSpan(2, 8)], num_blocks=8)


def test_a_slow_server_leaves_to_a_fast_one_what_that_serves_as_well() -> None:
    """At once, for nothing is loaded: the two blocks that it has alone were the swarm's weakest."""
    decision = overlapping().decision(0)
    assert (decision.verdict, decision.target) == (Verdict.MOVE, BlockSpan(0, 2))
    figures = decision.estimate
    assert (figures.load_s, figures.lost_rate) == (0.0, 0.0)
    assert figures.weakest_before == pytest.approx(2 * 10 / 7)
    assert figures.weakest_after == pytest.approx(2 * 10 / 3)


def test_it_takes_them_back_when_the_other_has_gone() -> None:
    """Which takes the time of loading."""
    fleet = Fleet([Lengths(6, 10.0, ENDLESS)], [BlockSpan(0, 2)], num_blocks=8)
    decision = fleet.decision(0)
    assert (decision.verdict, decision.target) == (Verdict.MOVE, BlockSpan(0, 6))
    assert decision.estimate.load_s == pytest.approx(POLICY.load_s(6) * 4 / 6)


def test_nobody_is_faster_for_fewer_blocks_where_its_link_is_the_bound() -> None:
    """Then the blocks that it would leave are a plain loss."""
    decision = overlapping(network_rps=2.0).decision(0)
    assert (decision.verdict, decision.target) == (Verdict.FITS, BlockSpan(0, 6))


def test_who_would_rather_serve_another_number() -> None:
    """The one whose decision says so; nobody who does not say what it holds, or whose link is the bound."""
    fleet = overlapping()
    assert wishing(fleet.state, fleet.lengths, POLICY) == [0]
    assert wishing(fleet.state, [None, fleet.lengths[1]], POLICY) == []
    bound = overlapping(network_rps=2.0)
    assert wishing(bound.state, bound.lengths, POLICY) == []


@pytest.mark.parametrize("fault", ["settling", "never moves", "does not say"])
def test_who_stays_all_the_same(fault: str) -> None:
    """It has come just now, may not move, or does not leave it to the rule."""
    fleet = overlapping()
    if fault == "does not say":
        fleet.lengths[0] = None  # type: ignore[call-overload]
        fleet.lengths[1] = None  # type: ignore[call-overload]
        state, own = overlapping().state, OwnSpan("a", BlockSpan(0, 6))
        staying = decide(state, own, COSTS, POLICY)
        assert with_lengths(staying, state, fleet.lengths, own, COSTS, POLICY) is staying
    elif fault == "settling":
        assert fleet.decision(0, served_s=1.0).verdict is Verdict.SETTLING
    else:
        assert fleet.decision(0, costs=MoveCosts(margin=float("inf"))).verdict is Verdict.TOO_DEAR


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    """Of all spans inside the present one or around it that leave no block to nobody."""
    fleet = Fleet.random(seed)
    fleet.spans[0] = BlockSpan(fleet.spans[0].start + 1, fleet.spans[0].end)
    state = fleet.state
    others = state.without("a")
    tau, own, lengths = scale(state, POLICY), fleet.spans[0], fleet.lengths[0]
    levels = {}
    for start in range(NUM_BLOCKS):
        for end in range(start + 1, min(NUM_BLOCKS, start + lengths.longest) + 1):
            span = BlockSpan(start, end)
            if own.covers(span) or span.covers(own):
                cover = others.planned_cover()
                left = [block for block in own if block not in span]
                cover[start:end] += lengths.throughput(end - start)
                if all(others.served_cover()[block] > 0 for block in left):
                    levels[span] = soft_minimum(cover, tau)
    best = max(levels.values())
    own_wish = OwnSpan("a", own)
    alone = [lengths] + [None] * (len(fleet.spans) - 1)
    resting = Decision(Verdict.FITS, own, own, decide(state, own_wish, COSTS, POLICY).estimate)
    decision = with_lengths(resting, state, alone, own_wish, COSTS, POLICY)
    if decision.target == own:  # what there is to win is not worth it
        work = lengths.throughput(len(own)) / NUM_BLOCKS
        assert best - levels[own] < 2 * POLICY.move_s * work * len(own)
    else:
        assert levels[decision.target] == pytest.approx(best, rel=1e-9)
        assert decision.estimate.gain == pytest.approx(best - levels[own])


@pytest.mark.parametrize("seed", range(4))
def test_turns_lead_to_rest_and_cost_nobody(seed: int) -> None:
    """All act on the same view again and again: no block is left alone, and what is won stays won."""
    fleet = Fleet.random(100 + seed)
    while any(decide(fleet.state, OwnSpan(peer, span), COSTS, POLICY).is_move
              for peer, span in zip(fleet.state.peers, fleet.spans, strict=True)):  # fmt: skip
        fleet.all_at_once()
    before, lowest = fleet.weakest, fleet.weakest
    for _ in range(40):
        if not fleet.all_at_once():
            break
        lowest = min(lowest, fleet.weakest)
    assert fleet.all_at_once() == 0
    assert fleet.weakest >= before
    assert lowest > 0.9 * before


def test_of_those_that_touch_the_same_blocks_one_goes() -> None:
    """Two twins beside a fast server both want to leave its blocks: the first by name does, the second waits."""
    twin = Lengths(6, 10.0, ENDLESS)
    fleet = Fleet(
        [twin, twin, Lengths(6, 80.0, ENDLESS)], [BlockSpan(0, 6), BlockSpan(0, 6), BlockSpan(2, 8)], 8
    )
    first, second = fleet.decision(0), fleet.decision(1)
    assert (first.verdict, second.verdict) == (Verdict.MOVE, Verdict.WAITS)
    assert [(turn.peer, turn.target) for turn in second.ahead] == [("a", first.target)]


def test_in_large_swarms_nobody_gives_blocks_up() -> None:
    """There is a server for every place; who gave some up before takes them back where that helps."""
    slow, fast = overlapping().lengths
    spans = [BlockSpan(0, 6)] + [BlockSpan(2, 8)] * 64
    large = Fleet([slow, *[fast] * 64], spans, num_blocks=8)
    state, own = large.state, OwnSpan(large.state.peers[0], spans[0])
    resting = Decision(Verdict.FITS, spans[0], spans[0], large.decision(0).estimate)
    assert with_lengths(resting, state, large.lengths, own, COSTS, POLICY) is resting


def test_lengths_are_read_from_records() -> None:
    """Of servers that say them, are free, and announce what they were measured from."""
    record = ServerRecord(
        ServerState.ONLINE, 1.0, BlockSpan(0, 2), version="petalsd 1", network_rps=50.0, forward_rps=30.0,
        using_relay=True, max_blocks=9,
    )  # fmt: skip
    records = {
        "Qa": record,
        "Qb": replace(record, max_blocks=None),
        "Qc": replace(record, forward_rps=None, network_rps=None),
        "Qd": replace(record, version="2.3.0"),
    }
    view = SwarmView("tiny", 4, [records, records, {}, {}])
    lengths = read_lengths(view, read_state(view))
    assert lengths == [Lengths(4, 30.0, 50.0, True), None, None, None]
    assert lengths[0] is not None
    assert [lengths[0].throughput(n) for n in (1, 2, 5)] == [10.0, 10.0, 10.0]
    assert replace(lengths[0], is_relayed=False).throughput(2) == 20.0
