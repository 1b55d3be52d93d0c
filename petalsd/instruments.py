"""Counters and histograms that cost a decode step next to nothing: a few additions, no lock, no library.

A series is written by one thread at a time. Any thread may read it, and may see the parts of a histogram at
different moments of one observation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Self


class Instrument:
    """One figure without labels, or the series of one with labels."""

    def __init__(self, label_names: Sequence[str], *arguments: Any) -> None:
        self._label_names = tuple(label_names)
        self._arguments = arguments
        self._series: dict[tuple[str, ...], Self] = {}

    def labels(self, *values: str) -> Self:
        """The series with these values, from then on at 0; ValueError unless there is one for each label."""
        if not values or len(values) != len(self._label_names):
            raise ValueError(f"the labels are {self._label_names}, got the values {values}")
        if values not in self._series:
            self._series[values] = type(self)((), *self._arguments)
        return self._series[values]

    def series(self) -> list[tuple[tuple[str, ...], Self]]:
        """The values of the labels and what was counted with them, in the order they were first named."""
        return list(self._series.items()) if self._label_names else [((), self)]


class Counter(Instrument):
    """A sum that only grows. With labels it has no value of its own: to add to that is an AttributeError."""

    value: float

    def __init__(self, label_names: Sequence[str] = ()) -> None:
        super().__init__(label_names)
        if not label_names:
            self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Histogram(Instrument):
    """How many values lie below each of ``bounds`` (ascending), and their sum. Labels are as for counters."""

    sum: float

    def __init__(self, label_names: Sequence[str], bounds: Sequence[float]) -> None:
        super().__init__(label_names, bounds)
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        if not label_names:
            self.sum = 0.0

    def observe(self, value: float) -> None:
        self.sum += value
        self._counts[bisect_left(self.bounds, value)] += 1

    def cumulative(self) -> list[int]:
        """How many values were at most each bound; the last number counts all values."""
        return list(accumulate(self._counts))
