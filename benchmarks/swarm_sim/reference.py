"""What a swarm could do at best: an upper bound, and what offline search with global knowledge reaches."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.swarm_sim.fleet import Array, Ints

_RISE, _SWEEPS, _TEMPERATURES = 0.05, 4, 12


def window_sums(values: Array, length: int) -> Array:
    """Sums of all runs of ``length`` values."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    return np.asarray(total[length:] - total[:-length])


def bound_shares(n: Ints, t: Array, blocks: int) -> Array:
    """Each server's share of an upper bound on the throughput; any subset is bounded by the sum of its shares.

    By linear programming duality: for block weights w of sum 1 no placement beats the sum over servers of
    t times the heaviest window of w.
    """
    weights = _dual_weights(n, t, blocks)
    best = {size: min(float(window_sums(weights, int(size)).max()), 1.0) for size in np.unique(n)}
    return t * np.array([best[size] for size in n])


def _dual_weights(n: Ints, t: Array, blocks: int, rounds: int = 1500) -> Array:
    """Fictitious play of the blocks against the servers' best replies; the best weights on the way."""
    sizes = np.unique(n)
    mass = np.array([t[n == size].sum() for size in sizes]) / t.sum()
    cover, average, best_value = np.zeros(blocks), np.zeros(blocks), math.inf
    best = np.full(blocks, 1 / blocks)
    for number in range(1, rounds + 1):
        weights = np.exp(-(cover - cover.min()) * 2 * math.sqrt(math.log(blocks) / number))
        weights /= weights.sum()
        average += weights
        for candidate in (weights, average / number) if number % 10 == 0 else (weights,):
            value = sum(
                share * window_sums(candidate, int(size)).max()
                for share, size in zip(mass, sizes, strict=True)
            )
            if value < best_value:
                best_value, best = value, candidate.copy()
        for share, size in zip(mass, sizes, strict=True):
            start = int(window_sums(weights, int(size)).argmax())
            cover[start : start + size] += share
    return best


def offline_best(n: Ints, t: Array, blocks: int, seed: int, restarts: int) -> float:
    """Throughput that coordinate descent on sum(exp(-cover / tau)) reaches while tau falls; 0 if no chain fits."""
    rng = np.random.default_rng([seed, 2])
    mean = float((n * t).sum() / blocks)
    found = [_descend(n, t, blocks, rng, mean) for _ in range(restarts if n.sum() >= blocks else 0)]
    return max(found, default=0.0)


def _descend(n: Ints, t: Array, blocks: int, rng: np.random.Generator, mean: float) -> float:
    start, cover, best = np.zeros(len(n), int), np.zeros(blocks), 0.0
    for row in sorted(range(len(n)), key=lambda row: -n[row] * t[row] * rng.uniform(0.7, 1.3)):
        _place(row, n, t, start, cover, _RISE * mean)
    for tau in mean * np.geomspace(0.15, 0.002, _TEMPERATURES):
        for _ in range(_SWEEPS):
            before = start.copy()
            for row in rng.permutation(len(n)):
                cover[start[row] : start[row] + n[row]] -= t[row]
                _place(row, n, t, start, cover, tau)
            best = max(best, float(cover.min()))
            if (before == start).all():
                break
    return best


def _place(row: int, n: Ints, t: Array, start: Ints, cover: Array, tau: float) -> None:
    length = int(n[row])
    at = int(window_sums(np.exp((cover.min() - cover) / tau), length).argmax())
    start[row] = at
    cover[at : at + length] += t[row]
