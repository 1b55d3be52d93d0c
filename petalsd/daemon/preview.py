"""What a rebalance would do, before anybody does it: where to, what the swarm gains, what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from petalsd.swarm.directory import SwarmView
from petalsd.swarm.placement import block_throughputs, choose_span
from petalsd.swarm.protocol import ServerState
from petalsd.types import BlockSpan


@dataclass(frozen=True, slots=True)
class Preview:
    """``before`` and ``after`` are the throughput of the swarm's weakest block, in tokens/s."""

    current: BlockSpan
    proposed: BlockSpan
    before: float
    after: float

    @property
    def blocks_kept(self) -> int:
        common = self.current.intersect(self.proposed)
        return 0 if common is None else len(common)

    @property
    def blocks_to_load(self) -> int:
        return len(self.proposed) - self.blocks_kept


def preview(view: SwarmView, peer: str, current: BlockSpan, proposed: BlockSpan | None) -> Preview:
    """``peer`` moves from ``current`` to ``proposed``, or to where a newcomer of its size is needed most.

    Every other server stays where it is: what the others would do then is theirs to say.
    """
    others = view.without({peer}).spans(ServerState.JOINING)
    target = proposed or choose_span(others, view.num_blocks, len(current))
    own = [remote.record.throughput for remote in view.spans(ServerState.JOINING) if remote.peer == peer]
    rate = max(own, default=0.0)
    rest = block_throughputs(others, view.num_blocks)
    return Preview(current, target, _weakest(rest, current, rate), _weakest(rest, target, rate))


def _weakest(rest: list[float], span: BlockSpan, rate: float) -> float:
    return min(total + (rate if block in span else 0.0) for block, total in enumerate(rest))
