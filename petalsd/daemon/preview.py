"""A decision about the placement in a person's words; the figures stand beside it."""

from __future__ import annotations

from petalsd.swarm.placement.decision import Decision, Verdict


def explain(decision: Decision) -> str:
    """Why the server moves or stays, in one sentence."""
    figures = decision.estimate
    match decision.verdict:
        case Verdict.MOVE:
            return f"blocks {decision.target} need this server more"
        case Verdict.FITS:
            return "no other blocks need this server more"
        case Verdict.WAITS:
            return f"others are to move first ({len(decision.ahead)} of them); then it is looked at again"
        case Verdict.TOO_DEAR:
            won, lost = round(figures.gain_tokens), round(figures.cost_tokens)
            return f"moving to blocks {decision.target} does not pay: {won:,} tokens won, {lost:,} lost"
        case Verdict.SETTLING:
            return f"it came here a short while ago; blocks {decision.target} would need it more"
        case Verdict.LOADING:
            return "the swarm's directory does not show yet that these blocks are served here"
