"""Pools whose books are checked after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.sizing import KVGeometry
from petalsd.kvcache.waiting import AdmissionRules

PAGE_TOKENS = 4
STRICTLY_IN_ORDER = AdmissionRules(bypass_wait_s=0)


@pytest.fixture
def make_pool() -> Iterator[Callable[..., KVPool]]:
    """Makes allocated CPU pools: ``make_pool(num_pages, dtype=...)``, and what KVPool takes besides."""
    pools: list[KVPool] = []

    def make(
        num_pages: int,
        dtype: torch.dtype = torch.float32,
        rules: AdmissionRules = STRICTLY_IN_ORDER,
        **options: Any,
    ) -> KVPool:
        geometry = KVGeometry(PAGE_TOKENS, num_kv_heads=2, head_dim=3, stored=dtype)
        pool = KVPool(geometry, num_pages, dtype, torch.device("cpu"), rules, **options)
        pool.allocate()
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.check_integrity()
        pool.close()


@pytest.fixture
def pool(make_pool: Callable[..., KVPool]) -> KVPool:
    """24 pages of 4 tokens, float32."""
    return make_pool(25)
