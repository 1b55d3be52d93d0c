"""The stock Petals client works against petalsd with the other families that Petals has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.clients import stock_greedy_ids
from tests.interop.models import PROMPT, random_model
from tests.interop.reference import greedy_ids
from tests.interop.stock import StockClient
from tests.interop.swarms import two_servers
from tests.tiny_models import LAYER_VARIANTS

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.timeout(300)]


@pytest.mark.parametrize("variant", ["bloom", "falcon-new", "falcon-alibi"])
def test_greedy_generation(variant: str, stock_client: StockClient, tmp_path: Path) -> None:
    """32 tokens for each of two rows equal those of transformers: prefill, decode, two servers that overlap."""
    family, overrides = LAYER_VARIANTS[variant]
    model = random_model(tmp_path, family, **overrides)
    prompts = [PROMPT, PROMPT[::-1]]
    with two_servers(model, tmp_path, "petalsd", "petalsd") as peers:
        ids = stock_greedy_ids(stock_client, model, peers, prompts, 32)
    assert ids == greedy_ids(model.local, prompts, 32)
