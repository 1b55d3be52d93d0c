"""What a person reads of a decision."""

from __future__ import annotations

import pytest

from petalsd.daemon.plan import Demand
from petalsd.daemon.preview import explain
from petalsd.swarm.placement.decision import Decision, Estimate, Turn, Verdict
from petalsd.types import BlockSpan

HERE, THERE = BlockSpan(0, 4), BlockSpan(4, 8)
FIGURES = Estimate(1.0, 2.0, 1.0, 0.5, 60.0, gain_tokens=1234.4, cost_tokens=5678.0)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict.MOVE, "blocks 4:8 need this server more"),
        (Verdict.FITS, "no other blocks need this server more"),
        (Verdict.WAITS, "others are to move first (2 of them)"),
        (Verdict.TOO_DEAR, "blocks 4:8 does not pay: 1,234 tokens won, 5,678 lost"),
        (Verdict.SETTLING, "came here a short while ago; blocks 4:8"),
        (Verdict.LOADING, "does not show yet"),
    ],
)
def test_every_verdict_is_explained(verdict: Verdict, words: str) -> None:
    turns = (Turn("a", HERE, THERE), Turn("b", HERE, THERE))
    assert words in explain(Decision(verdict, HERE, THERE, FIGURES, turns), Demand(4, None))


def test_moves_that_pay_only_together_are_told() -> None:
    """The figures beside it are of all of them."""
    turns = (Turn("12D3KooWabcdef", HERE, THERE), Turn("12D3KooWuvwxyz", HERE, BlockSpan(2, 6)))
    decision = Decision(Verdict.MOVE, HERE, THERE, FIGURES, together=turns)
    told = "and others close the gap that it leaves: …abcdef to 4:8, …uvwxyz to 2:6"
    assert explain(decision, Demand(4, None)) == f"blocks 4:8 need this server more, {told}"


@pytest.mark.parametrize(
    ("verdict", "target", "words"),
    [
        (Verdict.MOVE, BlockSpan(1, 3), "faster at blocks 1:3 and leaves the others to others"),
        (Verdict.MOVE, BlockSpan(0, 6), "takes blocks 0:6, though it is slower at each"),
        (Verdict.FITS, HERE, "and fewer or more of them would not help"),
    ],
)
def test_how_many_blocks_is_explained(verdict: Verdict, target: BlockSpan, words: str) -> None:
    assert words in explain(Decision(verdict, HERE, target, FIGURES), Demand(6, None, may_be_fewer=True))
