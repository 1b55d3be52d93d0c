"""Threads within a quota of processor time."""

from __future__ import annotations

import math

import pytest
import torch

from petalsd.ops import threads
from petalsd.ops.threads import fit_threads_to_quota, fitting_threads


@pytest.mark.parametrize(
    ("num_threads", "quota", "expected"),
    [(8, math.inf, 8), (8, 8.0, 8), (8, 2.5, 2), (8, 0.5, 1), (2, 4.0, 2)],
)
def test_whole_processors_that_are_granted(num_threads: int, quota: float, expected: int) -> None:
    """A part of one more would make all threads wait for the next period; one thread is the least."""
    assert fitting_threads(num_threads, quota) == expected


def test_torch_computes_with_no_more_than_are_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is left alone where the quota does not bind."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setattr(threads, "processor_quota", lambda group: math.inf)
        fit_threads_to_quota()
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(threads, "processor_quota", lambda group: 2.9)
        fit_threads_to_quota()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
