"""The stock Petals client works against petalsd: two daemons, each with half of the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.clients import stock_greedy_ids, stock_pass
from tests.interop.models import DEMO_PROMPT, PROMPT, Model
from tests.interop.reference import assert_same_pass, greedy_ids, random_inputs, run_pass
from tests.interop.stock import StockClient
from tests.interop.swarms import two_servers

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def peers(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The swarm of the tiny model."""
    with two_servers(tiny, tmp_path_factory.mktemp("swarm"), "petalsd", "petalsd") as maddrs:
        yield maddrs


def test_greedy_generation(tiny: Model, peers: list[str], stock_client: StockClient) -> None:
    """32 tokens for each of two rows equal those of transformers."""
    prompts = [PROMPT, PROMPT[::-1]]
    ids = stock_greedy_ids(stock_client, tiny, peers, prompts, 32)
    assert ids == greedy_ids(tiny.local, prompts, 32)


def test_long_prompt(tiny: Model, peers: list[str], stock_client: StockClient) -> None:
    """A prompt longer than a prefill chunk arrives in one message and is answered as one."""
    prompt = [[(37 * position) % 251 for position in range(400)]]
    assert stock_greedy_ids(stock_client, tiny, peers, prompt, 8) == greedy_ids(tiny.local, prompt, 8)


def test_beam_search(tiny: Model, peers: list[str], stock_client: StockClient) -> None:
    """Four beams, reordered on the servers at every step, end where the stock library's own beams end."""
    answer = stock_client.call(
        "generate", swarm=tiny.swarm(peers), input_ids=[PROMPT], max_new_tokens=16, num_beams=4, local=True
    )
    assert answer["output_ids"] == answer["expected_ids"]


@pytest.mark.parametrize("prefix", [3, None], ids=["prompts", "no-prompts"])
def test_forward_and_backward(
    tiny: Model, peers: list[str], stock_client: StockClient, tmp_path: Path, prefix: int | None
) -> None:
    """Outputs and the gradients of inputs and prompts equal those of transformers."""
    inputs = random_inputs(tiny.local, batch=2, tokens=7, prefix=prefix)
    result = stock_pass(stock_client, tiny, peers, inputs, tmp_path)
    assert_same_pass(result, run_pass(tiny.local, inputs))


def test_large_forward_and_backward(wide: Model, stock_client: StockClient, tmp_path: Path) -> None:
    """The same when the client splits the rows over two calls and each call into a stream of parts."""
    inputs = random_inputs(wide.local, batch=4, tokens=500, prefix=3)
    with two_servers(wide, tmp_path, "petalsd", "petalsd") as peers:
        result = stock_pass(stock_client, wide, peers, inputs, tmp_path)
    assert_same_pass(result, run_pass(wide.local, inputs))


@pytest.mark.demo_model
def test_real_model(demo: Model, stock_client: StockClient, tmp_path: Path) -> None:
    """64 tokens of the demo model equal those of transformers."""
    with two_servers(demo, tmp_path, "petalsd", "petalsd") as peers:
        ids = stock_greedy_ids(stock_client, demo, peers, [DEMO_PROMPT], 64)
    assert ids == greedy_ids(demo.local, [DEMO_PROMPT], 64)
