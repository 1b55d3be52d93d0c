"""What a list of measurements is summed up as: the median and the spread that four of six runs stay within."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 20th and 80th percentile of ``count`` samples, in the samples' unit."""

    median: float
    p20: float
    p80: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.p20:.3f} to {self.p80:.3f}, n={self.count})"


def summarize(samples: Sequence[float]) -> Spread:
    """Needs two samples at least; percentiles are interpolated between neighbours."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), fifths[0], fifths[3], len(samples))
