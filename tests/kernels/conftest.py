"""What every test of a kernel gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.device import DEVICE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with DEVICE:
        yield
