"""Stock Petals' rule of placement (docs/protocol.md, 6.3), in numpy and with its provable short cuts.

``tests/interop/test_placement.py`` compares it with the published package.
"""

from __future__ import annotations

import numpy as np

from benchmarks.swarm_sim.fleet import Array, Ints

EPS = 1e-3

Spans = tuple[Ints, Ints, Array]  # start, end, throughput


def best_start(cover: Array, length: int) -> int:
    """Start of the window whose sorted values are smallest, compared one by one; ties go to the left.

    Instead of sorting every window: go through the values from the smallest, and keep the windows that hold most
    of those that are equal to it.
    """
    starts = np.arange(len(cover) - length + 1)
    order = np.argsort(cover, kind="stable")
    values = cover[order]
    at = 0
    while at < len(order) and len(starts) > 1:
        upto = int(np.searchsorted(values, values[at], "right"))
        if upto - at == 1:
            block = order[at]
            count = (starts <= block) & (block < starts + length)
            if count.any():
                starts = starts[count]
        else:
            total = np.zeros(len(cover) + 1, np.int64)
            np.cumsum(cover == values[at], out=total[1:])
            held = total[starts + length] - total[starts]
            starts = starts[held == held.max()]
        at = upto
    return int(starts[0])


def should_move(
    spans: Spans, own: int, cover: Array, quality: float, bound: float, rng: np.random.Generator
) -> bool:
    """Whether server ``own`` should leave and choose again; ``bound`` is what no placement can surpass.

    ``rng`` gives the order in which everybody is imagined to move.
    """
    if quality > 1.0:
        return True
    start, end, throughput = spans
    before, rest = float(cover.min()), cover.copy()
    if before > EPS and before >= (quality - EPS) * bound + 1e-9:
        return False  # whatever everybody's moving finds is at most the bound
    a, b, rate = int(start[own]), int(end[own]), float(throughput[own])
    if b <= a:
        return False
    rest[a:b] -= rate * (1 + EPS)
    if before > EPS and rest.min() <= 0:
        return False
    target = best_start(rest, b - a)
    if target == a:
        return False
    rest[a:b] += rate * EPS
    rest[target : target + b - a] += rate
    moved = start.copy()
    moved[own] = target
    _settle(rest, moved, end - start, throughput, rng)
    after = float(rest.min())
    if after < before or after < EPS:
        return False
    return before / after < quality - EPS


def _settle(cover: Array, start: Ints, length: Ints, throughput: Array, rng: np.random.Generator) -> None:
    """Everybody moves to the best place in random order, until nobody wants to (at most 100 rounds)."""
    for _ in range(100):
        is_moving = False
        for row in rng.permutation(len(start)):
            at, size, rate = int(start[row]), int(length[row]), float(throughput[row])
            if size <= 0:
                continue
            cover[at : at + size] -= rate * (1 + EPS)
            target = best_start(cover, size)
            cover[at : at + size] += rate * EPS
            if target != at:
                start[row], is_moving = target, True
            cover[target : target + size] += rate
        if not is_moving:
            return
