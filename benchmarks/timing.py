"""Samples of several providers, taken in turns, and what a list of samples is summed up as."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Work: TypeAlias = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and percentiles of ``count`` samples, in the samples' unit."""

    median: float
    p5: float
    p20: float
    p80: float
    p95: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.p5:.3f} to {self.p95:.3f}, n={self.count})"


def summarize(samples: Sequence[float]) -> Spread:
    """Of one sample or more; percentiles are interpolated between neighbours."""
    if len(samples) == 1:
        return Spread(*[samples[0]] * 5, count=1)
    cuts = statistics.quantiles(samples, n=20, method="inclusive")
    return Spread(statistics.median(samples), cuts[0], cuts[3], cuts[15], cuts[18], len(samples))


@dataclass(frozen=True, slots=True)
class Pace:
    """How long is measured: ``rounds`` turns, each of ``round_s`` seconds at least and one call at least."""

    rounds: int
    round_s: float


def take_turns(works: Mapping[str, Work], pace: Pace) -> dict[str, list[float]]:
    """Seconds of each call by name. All take turns, so that they meet the same machine.

    The first call of a round is left out where calls are short: it brings the caches back from the others' turn.
    """
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(pace.rounds):
        for name, work in works.items():
            samples[name] += _round(work, pace.round_s)
    return samples


def _round(work: Work, round_s: float) -> list[float]:
    first = time_call(work)
    samples = [first] if first >= round_s else []
    end = time.perf_counter() + round_s - first
    while not samples or time.perf_counter() < end:
        samples.append(time_call(work))
    return samples


def time_call(work: Work) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
