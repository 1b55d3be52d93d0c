"""The stock Petals client works against petalsd: two daemons, each with half of the blocks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalsd.types import BlockSpan
from tests.interop.child import ChildFailed
from tests.interop.clients import stock_greedy_ids, stock_pass
from tests.interop.daemon import DaemonOptions, ForkedDaemon, move, petalsd_daemon, running_daemon
from tests.interop.models import DEMO_PROMPT, PROMPT, Model
from tests.interop.reference import assert_same_pass, greedy_ids, random_inputs, run_pass
from tests.interop.stock import StockClient
from tests.interop.swarms import two_servers

pytestmark = [pytest.mark.interop, pytest.mark.swarm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both servers of the swarm."""
    return tmp_path_factory.mktemp("swarm")


@pytest.fixture(scope="module")
def peers(tiny: Model, directory: Path) -> Iterator[list[str]]:
    """The swarm of the tiny model."""
    with two_servers(tiny, directory, "petalsd", "petalsd") as maddrs:
        yield maddrs


def tokens_reused(server: Path) -> int:
    """Of prompts, since the start of the server in this directory."""
    command = [sys.executable, "-m", "petalsd.cli.petalsctl.main", "--socket", str(server / "control.sock")]
    done = subprocess.run([*command, "status", "--json"], capture_output=True, check=True, timeout=60)
    return int(json.loads(done.stdout)["kv"]["prefixes"]["tokens_reused"])


def test_greedy_generation(tiny: Model, peers: list[str], stock_client: StockClient) -> None:
    """32 tokens for each of two rows equal those of transformers."""
    prompts = [PROMPT, PROMPT[::-1]]
    ids = stock_greedy_ids(stock_client, tiny, peers, prompts, 32)
    assert ids == greedy_ids(tiny.local, prompts, 32)


def test_long_prompt(tiny: Model, peers: list[str], stock_client: StockClient) -> None:
    """A prompt longer than a prefill chunk arrives in one message and is answered as one."""
    prompt = [[(37 * position) % 251 for position in range(400)]]
    assert stock_greedy_ids(stock_client, tiny, peers, prompt, 8) == greedy_ids(tiny.local, prompt, 8)


def test_conversation(tiny: Model, peers: list[str], directory: Path, stock_client: StockClient) -> None:
    """Each turn brings all that was said before, and neither server computes again what it has whole."""
    servers = [directory / name for name in ("first", "second")]
    before = [tokens_reused(server) for server in servers]
    said = [[(41 * position) % 251 for position in range(100)]]
    for _ in range(3):
        answer = stock_greedy_ids(stock_client, tiny, peers, said, 20)
        assert answer == greedy_ids(tiny.local, said, 20)
        said = [answer[0] + [(43 * position) % 251 for position in range(30)]]
    # 100, 150 and 200 tokens: one whole piece of 64 is known to the second turn, two are to the third.
    assert [tokens_reused(server) for server in servers] == [reused + 3 * 64 for reused in before]


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


def test_a_session_on_blocks_that_a_server_leaves(
    tiny: Model, stock_client: StockClient, tmp_path: Path
) -> None:
    """It cannot be handed over; the error that ends it sends the stock client to another server at once.

    There the client trips over its own cache, as it does whenever a session is lost after its first step
    (protocol.md 4.6): that is why such sessions have the time of a drain. Its next session is whole.
    """

    def options(name: str, span: BlockSpan, initial_peers: list[str]) -> DaemonOptions:
        return DaemonOptions(tiny.directory, tmp_path / name, tiny.dht_prefix, span, initial_peers)

    leaving = options("leaving", BlockSpan(0, 3), [])
    with (
        running_daemon(leaving, ForkedDaemon) as (process, peers),
        petalsd_daemon(options("upper", BlockSpan(2, 4), peers), ForkedDaemon) as upper,
    ):
        swarm = tiny.swarm(peers + upper)
        begun = stock_client.call(
            "begin_generation", swarm=swarm, input_ids=[PROMPT], max_new_tokens=6, max_length=32
        )
        assert begun["servers"][0] == _peer_id(peers)
        assert begun["output_ids"] == greedy_ids(tiny.local, [PROMPT], 6)
        with petalsd_daemon(options("taker", BlockSpan(0, 3), peers), ForkedDaemon) as taker:
            move(process, leaving, BlockSpan(2, 4))
            with pytest.raises(ChildFailed, match=rf"Broken input cache: .*{_peer_id(taker)}"):
                stock_client.call("finish_generation", swarm=swarm, max_new_tokens=8)
            ids = stock_greedy_ids(stock_client, tiny, peers + upper, [PROMPT], 14)
    assert re.search(r"retry in 0 sec.*session_closed: the server moved to blocks 2:4", stock_client.log)
    assert ids == greedy_ids(tiny.local, [PROMPT], 14)


def _peer_id(maddrs: list[str]) -> str:
    return maddrs[0].rpartition("/")[2]


@pytest.mark.demo_model
def test_real_model(demo: Model, stock_client: StockClient, tmp_path: Path) -> None:
    """64 tokens of the demo model equal those of transformers."""
    with two_servers(demo, tmp_path, "petalsd", "petalsd") as peers:
        ids = stock_greedy_ids(stock_client, demo, peers, [DEMO_PROMPT], 64)
    assert ids == greedy_ids(demo.local, [DEMO_PROMPT], 64)
