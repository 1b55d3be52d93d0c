"""A decision about the placement in a person's words."""

from __future__ import annotations

from petalsd.swarm.placement.decision import Decision, Verdict


def explain(decision: Decision) -> str:
    """Why the server moves or stays, with the numbers that decided it. Rates are of the swarm's weakest block."""
    figures = decision.estimate
    won = f"{figures.gain_tokens:.0f} tokens won, {figures.cost_tokens:.0f} lost while blocks load"
    weakest = ", ".join(map(str, decision.weakest[:_FEW])) + (" ..." if len(decision.weakest) > _FEW else "")
    match decision.verdict:
        case Verdict.MOVE:
            return f"blocks {weakest} are served worst; {won}"
        case Verdict.WAITS:
            first = decision.ahead[0]
            return (
                f"{len(decision.ahead)} others move first, beginning with {first.peer[-6:]} from {first.span} "
                f"to {first.target}"
            )
        case Verdict.TOO_DEAR:
            return f"moving to {decision.target} does not pay: {won}"
        case Verdict.SETTLING:
            return f"it has served these blocks too short a time to move to {decision.target}"
        case Verdict.LOADING:
            return "the swarm's directory does not show yet that these blocks are served here"
        case Verdict.FITS:
            return f"no other blocks need this server more; blocks {weakest} are served worst"


_FEW = 3
