"""The demo model over a part of the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.demo_numerics import DemoNumerics

NUM_TOKENS = 512


@pytest.fixture(scope="module")
def numerics(demo_model: Path) -> DemoNumerics:
    return DemoNumerics(demo_model, num_tokens=NUM_TOKENS)
