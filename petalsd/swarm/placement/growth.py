"""In which order a server loads blocks: what it serves is one span that grows, to where it is needed first."""

from __future__ import annotations

import math

from petalsd.swarm.placement.state import SwarmState
from petalsd.types import BlockSpan


def loading_order(state: SwarmState, peer: str, goal: BlockSpan, served: BlockSpan | None) -> list[int]:
    """All blocks of ``goal``: those of ``served`` first, then outward, each time the one that others serve less.

    ``served`` is what ``peer`` serves of ``goal`` already; None: it begins with the block that others serve least.
    All beginnings of the list are consecutive blocks. Ties: the lowest, and to the right.
    """
    cover = state.without(peer).served_cover()
    if served is None:
        first = goal.start + int(cover[goal.start : goal.end].argmin())
        served = BlockSpan(first, first + 1)
    order, left, right = list(served), served.start - 1, served.end
    while left >= goal.start or right < goal.end:
        on_left = cover[left] if left >= goal.start else math.inf
        on_right = cover[right] if right < goal.end else math.inf
        if on_left < on_right:
            order.append(left)
            left -= 1
        else:
            order.append(right)
            right += 1
    return order
