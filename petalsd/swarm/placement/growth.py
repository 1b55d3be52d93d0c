"""In which order a server loads blocks: what it serves is one span that grows, to where it is needed first."""

from __future__ import annotations

import math

import numpy as np

from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.state import Floats, SwarmState, cover
from petalsd.types import BlockSpan


def loading_order(
    state: SwarmState, peer: str, goal: BlockSpan, served: BlockSpan | None, policy: Policy
) -> list[int]:
    """All blocks of ``goal``: those of ``served`` first, then outward, each time the one that others serve less.

    ``served`` is what ``peer`` serves of ``goal`` already; None: it begins with the block that others serve least.
    What others are loading counts by how soon it will be there: a gap is filled from both ends.
    All beginnings of the list are consecutive blocks. Ties: the lowest, and to the right.
    """
    soon = _soon_served(state.without(peer), policy)
    if served is None:
        first = goal.start + int(soon[goal.start : goal.end].argmin())
        served = BlockSpan(first, first + 1)
    order, left, right = list(served), served.start - 1, served.end
    while left >= goal.start or right < goal.end:
        on_left = soon[left] if left >= goal.start else math.inf
        on_right = soon[right] if right < goal.end else math.inf
        if on_left < on_right:
            order.append(left)
            left -= 1
        else:
            order.append(right)
            right += 1
    return order


def _soon_served(state: SwarmState, policy: Policy) -> Floats:
    """[num_blocks] tokens/s of what will stay, and of what is loaded, discounted by the time until it serves.

    Negative where nobody serves: that comes first. Others load outward from what they serve of their goal already;
    from what is served least where that is nothing.
    """
    end = state.start + state.length
    first, last = np.clip(state.served_start, state.start, end), np.clip(state.served_end, state.start, end)
    now = cover(state.num_blocks, first, last, state.throughput)
    soon, block = now.copy(), np.arange(state.num_blocks)
    for row in np.flatnonzero(last - first < state.length).tolist():
        goal, num_blocks = slice(int(state.start[row]), int(end[row])), float(state.length[row])
        left, right = int(first[row]), int(last[row])
        if left == right:
            left = right = goal.start + int(now[goal].argmin())
        distance = np.maximum(left - block[goal], block[goal] - right + 1)
        discount = np.exp(-policy.load_s(num_blocks) / num_blocks * distance / policy.soon_s)
        soon[goal] += state.throughput[row] * np.where(distance > 0, discount, 0.0)
    return np.where(now > 0, soon, soon - state.throughput.sum())
