"""A decision about the placement in a person's words; the figures stand beside it."""

from __future__ import annotations

from petalsd.daemon.plan import Demand
from petalsd.swarm.placement.decision import Decision, Verdict


def explain(decision: Decision, demand: Demand) -> str:
    """Why the server moves or stays, in one sentence."""
    figures = decision.estimate
    match decision.verdict:
        case Verdict.MOVE:
            return _why_move(decision)
        case Verdict.FITS:
            fits = "no other blocks need this server more"
            return f"{fits}, and fewer or more of them would not help" if demand.may_be_fewer else fits
        case Verdict.WAITS:
            return f"others are to move first ({len(decision.ahead)} of them); then it is looked at again"
        case Verdict.TOO_DEAR:
            won, lost = round(figures.gain_tokens), round(figures.cost_tokens)
            return f"moving to blocks {decision.target} does not pay: {won:,} tokens won, {lost:,} lost"
        case Verdict.SETTLING:
            return f"it came here a short while ago; blocks {decision.target} would need it more"
        case Verdict.LOADING:
            return "the swarm's directory does not show yet that these blocks are served here"


def _why_move(decision: Decision) -> str:
    span, target = decision.span, decision.target
    if len(target) < len(span) and span.covers(target):
        return f"the swarm gains when the server is faster at blocks {target} and leaves the others to others"
    if len(target) > len(span) and target.covers(span):
        return f"the swarm gains when the server takes blocks {target}, though it is slower at each"
    why = f"blocks {target} need this server more"
    if decision.together:
        others = ", ".join(f"…{turn.peer[-6:]} to {turn.target}" for turn in decision.together)
        return f"{why}, and others close the gap that it leaves: {others}"
    return why
