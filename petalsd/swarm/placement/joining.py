"""Where a newcomer is needed most."""

from __future__ import annotations

import numpy as np

from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.potential import scale
from petalsd.swarm.placement.state import Floats, SwarmState
from petalsd.types import BlockSpan


def choose_start(state: SwarmState, length: int, throughput: float, policy: Policy) -> int:
    """First of the ``length`` blocks that gain the swarm most from ``throughput`` tokens/s more; ties: the lowest.

    ``state`` has the others only. ValueError when the model has not that many blocks.
    """
    if not 1 <= length <= state.num_blocks:
        raise ValueError(f"cannot place {length} blocks among {state.num_blocks}")
    tau = scale(state, policy, length * throughput / state.num_blocks)
    worth = worths(state.planned_cover(), length, tau)
    return int(np.flatnonzero(worth >= worth.max() * (1 - 1e-9))[0])


def worths(cover: Floats, length: int, tau: float) -> Floats:
    """[num_blocks - length + 1] what a little more throughput from each start on is worth, by any one measure.

    ``cover`` is the others', in the unit of ``tau``, which says how soft the minimum over blocks is.
    """
    weight = np.exp(np.maximum((cover.min() - cover) / tau, -60.0))
    total = np.concatenate(([0.0], np.cumsum(weight)))
    worth: Floats = total[length:] - total[: len(cover) - length + 1]
    return worth


def choose_span(state: SwarmState, length: int, throughput: float, policy: Policy) -> BlockSpan:
    """The first choice of a server that brings ``length`` blocks; see ``choose_start``."""
    start = choose_start(state, length, throughput, policy)
    return BlockSpan(start, start + length)
