"""How long one decision takes, on swarms that nobody has settled yet."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.swarm_sim.fleet import MODELS, draw_hardware
from petalsd.swarm.placement.decision import MoveCosts, OwnSpan, decide
from petalsd.swarm.placement.policy import Policy
from petalsd.swarm.placement.state import SwarmState
from petalsd.types import BlockSpan


def unsettled_state(model: str, servers: int, seed: int) -> SwarmState:
    """Servers of the simulated hardware at random places, all of them online and free."""
    rng, blocks = np.random.default_rng([seed, 5]), MODELS[model].blocks
    hardware = draw_hardware(MODELS[model], servers, rng)
    n = hardware.n
    start = rng.integers(0, blocks - n + 1)
    return SwarmState(
        num_blocks=blocks,
        peers=[f"{row:08d}" for row in range(servers)],
        start=start,
        length=n,
        served_start=start,
        served_end=start + n,
        throughput=hardware.t,
        is_free=n < blocks,
        is_pledged=np.ones(servers, bool),
    )


def slowest_decision_ms(model: str, servers: int, seed: int = 0, repetitions: int = 20) -> float:
    """CPU time of the slowest of some servers' decisions; nothing is shared between them."""
    state, slowest, policy = unsettled_state(model, servers, seed), 0.0, Policy()
    for row in np.linspace(0, servers - 1, repetitions).astype(int).tolist():
        start = int(state.start[row])
        own = OwnSpan(state.peers[row], BlockSpan(start, start + int(state.length[row])))
        begin = time.thread_time()
        decide(state, own, MoveCosts(), policy)
        slowest = max(slowest, time.thread_time() - begin)
    return slowest * 1e3
