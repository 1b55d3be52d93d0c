"""What a swarm agrees on by following the same rule: servers with other numbers would not take turns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The constants of the rule; the defaults were tuned in ``benchmarks/swarm_sim``.

    softness        how soft the minimum over blocks is, as a share of the mean cover
    spare           share of each block's largest contribution that is not relied upon: that server may crash
    horizon_s       how long a gain is expected to last
    load_base_s     what loading a whole span takes at least, and
    load_block_s    for each of its blocks; a move loads the share of it that is new
    hole_weight     how many times worse no throughput is than a little: every session breaks at a hole
    session_s       seconds of work that are lost with the sessions of blocks that are left; 0 with hand-over
    min_stay_s      a server that has come or moved stays at least that long, unless a block has nobody
    max_moves       length of the list of moves that may begin at the same time
    num_candidates  how many servers are looked at closely: those whose blocks are needed least
    """

    softness: float = 0.04
    spare: float = 0.25
    horizon_s: float = 1800.0
    load_base_s: float = 60.0
    load_block_s: float = 2.0
    hole_weight: float = 1.0
    session_s: float = 0.0
    min_stay_s: float = 60.0
    max_moves: int = 32
    num_candidates: int = 256

    def load_s(self, length: int) -> float:
        """Expected time to load ``length`` blocks."""
        return self.load_base_s + self.load_block_s * length
