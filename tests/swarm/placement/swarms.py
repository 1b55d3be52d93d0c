"""Swarms to place servers in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from petalsd.swarm.placement.state import SwarmState


def state_of(num_blocks: int, *spans: tuple[int, int, float], is_free: bool = True) -> SwarmState:
    """Servers named a, b, c, ... that serve (start, end, throughput)."""
    start, end = (np.array([span[column] for span in spans], np.int64) for column in (0, 1))
    return SwarmState(
        num_blocks=num_blocks,
        peers=[chr(ord("a") + number) for number in range(len(spans))],
        start=start,
        length=end - start,
        served_start=start,
        served_end=end,
        throughput=np.array([span[2] for span in spans], np.float64),
        is_free=np.full(len(spans), is_free),
        is_pledged=np.ones(len(spans), bool),
    )


def random_state(seed: int, servers: int = 24, num_blocks: int = 16) -> SwarmState:
    """Servers of up to half of the blocks, at random places."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, num_blocks // 2, servers)
    start = rng.integers(0, num_blocks - length + 1)
    return SwarmState(
        num_blocks=num_blocks,
        peers=[f"{row:03d}" for row in range(servers)],
        start=start,
        length=length,
        served_start=start,
        served_end=start + length,
        throughput=rng.lognormal(2.0, 1.0, servers),
        is_free=np.ones(servers, bool),
        is_pledged=np.ones(servers, bool),
    )


def loading(state: SwarmState, count: int) -> SwarmState:
    """The first ``count`` servers have announced their blocks and serve none of them yet."""
    is_there = np.arange(len(state.peers)) >= count
    return replace(
        state, served_end=np.where(is_there, state.served_end, state.served_start), is_free=is_there
    )
