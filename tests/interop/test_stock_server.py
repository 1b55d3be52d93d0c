"""Stock Petals servers work for both clients: for the stock one (so the set-up is sound) and for petalsd's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interop.clients import our_greedy_ids, our_pass, stock_greedy_ids
from tests.interop.models import DEMO_PROMPT, PROMPT, Model
from tests.interop.reference import assert_same_pass, greedy_ids, random_inputs, run_pass
from tests.interop.stock import StockClient
from tests.interop.swarms import two_servers

# Daily both clients go through one stock server in a chain (test_mixed_chain).
pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.nightly, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def peers(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The swarm of the tiny model."""
    with two_servers(tiny, tmp_path_factory.mktemp("swarm"), "stock", "stock") as maddrs:
        yield maddrs


def test_stock_client(tiny: Model, peers: list[str], stock_client: StockClient) -> None:
    """Where this fails, the fault is not petalsd's."""
    ids = stock_greedy_ids(stock_client, tiny, peers, [PROMPT], 16)
    assert ids == greedy_ids(tiny.local, [PROMPT], 16)


def test_greedy_generation(tiny: Model, peers: list[str]) -> None:
    """petalsd's client generates what transformers generates, for two rows."""
    prompts = [PROMPT, PROMPT[::-1]]
    assert our_greedy_ids(tiny, peers, prompts, 32) == greedy_ids(tiny.local, prompts, 32)


def test_long_prompt(tiny: Model, peers: list[str]) -> None:
    """A prompt that our client sends in several steps gives the same cache."""
    prompt = [[(37 * position) % 251 for position in range(400)]] * 3
    assert our_greedy_ids(tiny, peers, prompt, 8) == greedy_ids(tiny.local, prompt, 8)


@pytest.mark.parametrize("prefix", [3, None], ids=["prompts", "no-prompts"])
def test_forward_and_backward(tiny: Model, peers: list[str], prefix: int | None) -> None:
    """Outputs and the gradients of inputs and prompts equal those of transformers."""
    inputs = random_inputs(tiny.local, batch=2, tokens=7, prefix=prefix)
    assert_same_pass(our_pass(tiny, peers, inputs), run_pass(tiny.local, inputs))


@pytest.mark.demo_model
def test_real_model(demo: Model, tmp_path_factory: pytest.TempPathFactory) -> None:
    """32 tokens of the demo model equal those of transformers."""
    with two_servers(demo, tmp_path_factory.mktemp("swarm"), "stock", "stock") as peers:
        ids = our_greedy_ids(demo, peers, [DEMO_PROMPT], 32)
    assert ids == greedy_ids(demo.local, [DEMO_PROMPT], 32)
