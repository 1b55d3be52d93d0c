"""What counters and histograms count, and what they refuse."""

from __future__ import annotations

import pytest

from petalsd.instruments import Counter, Histogram


def test_a_counter_adds_up() -> None:
    counter = Counter()
    counter.inc()
    counter.inc(2.5)
    assert counter.value == 3.5
    assert counter.series() == [((), counter)]


def test_a_histogram_counts_values_up_to_each_bound() -> None:
    """A value that equals a bound lies within it; one above all bounds counts in the total alone."""
    histogram = Histogram((), (1, 2, 4))
    for value in (0.5, 1, 1.5, 4, 9):
        histogram.observe(value)
    assert histogram.cumulative() == [2, 3, 4, 5]
    assert histogram.sum == 16


def test_a_series_starts_at_zero_and_is_the_same_each_time() -> None:
    """Series stand in the order in which they were named, and count apart."""
    counter, histogram = Counter(("method",)), Histogram(("method",), (1,))
    counter.labels("b").inc()
    assert counter.labels("b") is counter.labels("b")
    assert [(values, series.value) for values, series in counter.series()] == [(("b",), 1)]
    histogram.labels("a").observe(3)
    assert histogram.labels("b").cumulative() == [0, 0]
    assert [values for values, _ in histogram.series()] == [("a",), ("b",)]


@pytest.mark.parametrize("values", [(), ("a",), ("a", "b", "c")])
def test_each_label_needs_a_value(values: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="'method', 'code'"):
        Counter(("method", "code")).labels(*values)


def test_what_has_labels_counts_in_its_series_only() -> None:
    """A value without labels would appear nowhere."""
    with pytest.raises(AttributeError):
        Counter(("method",)).inc()
    with pytest.raises(AttributeError):
        Histogram(("method",), (1,)).observe(1)
    with pytest.raises(ValueError, match="labels"):
        Counter().labels("a")
