"""What a swarm agrees on by following the same rule: servers with other numbers would not take turns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

from petalsd.swarm.placement.state import Floats, SwarmState

T = TypeVar("T", float, Floats)


@dataclass(frozen=True, slots=True)
class Policy:
    """The constants of the rule; the defaults were tuned in ``benchmarks/swarm_sim``.

    softness        how soft the minimum over blocks is, as a share of the mean cover
    horizon_s       how long a gain is expected to last; it counts for less the later it comes
    settled_horizon_s  the same while nobody loads blocks: no change is under way that makes plans worthless
    load_base_s     what loading a whole span takes at least, and
    load_block_s    for each of its blocks; a move loads the share of it that is new
    leaving_share   of that time the blocks that are left are missing: until then, the new ones are downloaded
    pending_s       how long blocks that others are loading will be missing yet, as far as one knows
    margin          a move is listed if it wins that many times what it costs: what balance_quality is by default,
                    as one that is listed and does not go lets the others wait in vain
    hole_weight     how many times worse no throughput is than a little: every session breaks at a hole
    move_s          seconds of the server's work that a whole move costs at least: small gains are left alone
    min_stay_s      a server that has come or moved stays at least that long, unless a block has nobody; its record
                    says since when it is there, so that no turn is kept for it
    moves_share     how many moves may begin at the same time, as a share of the servers, and
    min_moves, max_moves: bounds of that
    candidates_per_move  how many servers are looked at closely: those whose blocks are needed least
    chain_servers   in swarms of up to so many servers moves that pay only together are looked for
    soon_s          where a server grows first, blocks that others will have loaded in t count by exp(-t / soon_s)
    """

    softness: float = 0.02
    horizon_s: float = 100.0
    settled_horizon_s: float = 200.0
    load_base_s: float = 60.0
    load_block_s: float = 2.0
    leaving_share: float = 0.5
    pending_s: float = 60.0
    margin: float = 4 / 3
    hole_weight: float = 1.0
    move_s: float = 10.0
    min_stay_s: float = 30.0
    moves_share: float = 0.04
    min_moves: int = 4
    max_moves: int = 24
    candidates_per_move: int = 8
    chain_servers: int = 64
    soon_s: float = 40.0

    def seen(self, state: SwarmState) -> Policy:
        """What holds in that state."""
        return replace(self, horizon_s=self.settled_horizon_s) if state.is_settled else self

    def num_moves(self, servers: int) -> int:
        """Length of the list of a swarm of that many servers."""
        return min(max(math.ceil(self.moves_share * servers), self.min_moves), self.max_moves)

    def load_s(self, length: T) -> T:
        """Expected time to load ``length`` blocks."""
        return self.load_base_s + self.load_block_s * length

    def lasting_s(self, load_s: T) -> T:
        """How long a gain is expected to be had that begins in ``load_s``: the swarm may have changed by then."""
        return self.horizon_s / (1.0 + load_s / self.horizon_s)
