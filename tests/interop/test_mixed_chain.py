"""A chain of one petalsd and one stock server, in either order, serves both clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.clients import our_greedy_ids, our_pass, stock_greedy_ids, stock_pass
from tests.interop.models import PROMPT, Model
from tests.interop.reference import assert_same_pass, greedy_ids, random_inputs, run_pass
from tests.interop.stock import StockClient
from tests.interop.swarms import two_servers
from tests.tiers import nightly_except

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.timeout(300)]


ORDERS = [("petalsd", "stock"), ("stock", "petalsd")]


@pytest.fixture(scope="module", params=nightly_except(ORDERS, ORDERS[0]), ids="-then-".join)
def peers(
    request: pytest.FixtureRequest, tiny: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    first, second = request.param
    with two_servers(tiny, tmp_path_factory.mktemp("swarm"), first, second) as maddrs:
        yield maddrs


def test_our_client_generates(tiny: Model, peers: list[str]) -> None:
    """32 tokens equal those of transformers."""
    assert our_greedy_ids(tiny, peers, [PROMPT], 32) == greedy_ids(tiny.local, [PROMPT], 32)


def test_stock_client_generates(tiny: Model, peers: list[str], stock_client: StockClient) -> None:
    """32 tokens equal those of transformers; the client asks petalsd to push each step on to the stock server."""
    ids = stock_greedy_ids(stock_client, tiny, peers, [PROMPT], 32)
    assert ids == greedy_ids(tiny.local, [PROMPT], 32)


def test_our_client_passes(tiny: Model, peers: list[str]) -> None:
    """Forward and backward with prompts equal those of transformers."""
    inputs = random_inputs(tiny.local, batch=2, tokens=7, prefix=3)
    assert_same_pass(our_pass(tiny, peers, inputs), run_pass(tiny.local, inputs))


def test_stock_client_passes(
    tiny: Model, peers: list[str], stock_client: StockClient, tmp_path: Path
) -> None:
    """Forward and backward with prompts equal those of transformers."""
    inputs = random_inputs(tiny.local, batch=2, tokens=7, prefix=3)
    result = stock_pass(stock_client, tiny, peers, inputs, tmp_path)
    assert_same_pass(result, run_pass(tiny.local, inputs))
