"""Decisions of a server about its place."""

from __future__ import annotations

from dataclasses import replace

from petalsd.swarm.placement.decision import Decision, Estimate, Verdict
from petalsd.types import BlockSpan

OLD, NEW = BlockSpan(0, 4), BlockSpan(2, 6)
MOVE = Decision(Verdict.MOVE, OLD, NEW, Estimate(10.0, 14.0, 3.0, 1.0, 60.0, 300.0, 60.0))


def staying(span: BlockSpan, weakest: float, verdict: Verdict = Verdict.FITS) -> Decision:
    return Decision(
        verdict, span, span, replace(MOVE.estimate, weakest_before=weakest, weakest_after=weakest)
    )
