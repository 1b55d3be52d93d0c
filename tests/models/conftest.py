"""The demo model over a part of the text, and a Hub that has what a test file calls its ``checkpoint``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from petalsd.models import hub_download
from tests.models.demo_numerics import DemoNumerics
from tests.models.fake_hub import FakeHub

NUM_TOKENS = 512


@pytest.fixture(scope="module")
def numerics(demo_model: Path) -> DemoNumerics:
    return DemoNumerics(demo_model, num_tokens=NUM_TOKENS)


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(checkpoint)
    fake.start()
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
    monkeypatch.setattr(hub_download.time, "sleep", lambda seconds: None)
    yield fake
    fake.stop()
