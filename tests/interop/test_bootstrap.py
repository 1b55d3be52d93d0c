"""Stock Petals through our bootstrap node: its servers join there, its clients find them, and it lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalsd.types import BlockSpan
from tests.interop.clients import our_greedy_ids, stock_greedy_ids
from tests.interop.daemon import bootstrap_node
from tests.interop.models import PROMPT, Model
from tests.interop.reference import greedy_ids
from tests.interop.stock import ServerOptions, StockClient, stock_server

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.timeout(300)]


def test_a_stock_server_and_both_clients(tiny: Model, tmp_path: Path, stock_client: StockClient) -> None:
    """Nobody but the bootstrap node is named to any of them."""
    with bootstrap_node(tmp_path / "boot") as peers:
        span = BlockSpan(0, tiny.num_blocks)
        options = ServerOptions(tiny.petals_directory, tmp_path / "stock", tiny.dht_prefix, span, peers)
        with stock_server(options):
            expected = greedy_ids(tiny.local, [PROMPT], 8)
            assert stock_greedy_ids(stock_client, tiny, peers, [PROMPT], 8) == expected
            assert our_greedy_ids(tiny, peers, [PROMPT], 8) == expected
