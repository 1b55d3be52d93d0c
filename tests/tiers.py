"""Which tests a change waits for, and which only a nightly run repeats.

``make test`` leaves out what is marked ``nightly``: further cases of something that a quicker test covers too,
each with more than its share of the time. ``make test-all`` has them, and so has pytest by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def nightly_except(cases: Iterable[object], *daily: object) -> list[object]:
    """The cases for ``pytest.mark.parametrize``; all but those named are left to a nightly run."""
    found = list(cases)
    assert found and all(case in found for case in daily), daily
    return [case if case in daily else pytest.param(case, marks=pytest.mark.nightly) for case in found]
