"""The real model through real daemons: every token as transformers computes it, whatever happens meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from petalsd.client.model import RemoteCausalLM
from petalsd.demo.__main__ import PREFIX, START_TIMEOUT_S, Daemons
from tests.e2e.conftest import FIRST_HALF, SECOND_HALF

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.demo_model, pytest.mark.timeout(300)]

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def client(demo_model: Path, swarm: list[str]) -> Iterator[RemoteCausalLM]:
    with connect(demo_model, swarm) as model:
        yield model


def connect(model: Path, peers: list[str]) -> RemoteCausalLM:
    return RemoteCausalLM.from_pretrained(model, initial_peers=peers, dht_prefix=PREFIX, dtype=torch.float32)


def greedy(model: PreTrainedModel | RemoteCausalLM, ids: torch.Tensor, **more: object) -> list[int]:
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **more}
    return model.generate(ids, **settings)[0].tolist()


def is_greedy(reference: PreTrainedModel, answer: list[int]) -> bool:
    """Whether transformers too would choose each of the last NEW_TOKENS after those before it.

    One pass over the answer says what generating it token by token would, in a fraction of the time.
    """
    with torch.inference_mode():
        logits = reference(torch.tensor([answer[:-1]])).logits[0, -NEW_TOKENS:]
        logits[:, reference.generation_config.eos_token_id] = -torch.inf  # min_new_tokens forbids the end
    return logits.argmax(dim=-1).tolist() == answer[-NEW_TOKENS:]


def free_cache_tokens(client: RemoteCausalLM) -> dict[str, int]:
    """By peer, as each server says itself."""
    peers = {span.peer for span in client.client.manager.spans}
    return {
        peer: client.runtime.run(client.client.connect(peer).rpc_info())["cache_tokens_available"]
        for peer in peers
    }


def wait_until_free(client: RemoteCausalLM, expected: dict[str, int], timeout_s: float) -> float:
    """Seconds until the servers' caches are ``expected`` again."""
    started_s = time.monotonic()
    while (now := free_cache_tokens(client)) != expected:
        assert time.monotonic() - started_s < timeout_s, f"{now} is not {expected}"
    return time.monotonic() - started_s


def test_greedy_generation(
    client: RemoteCausalLM, reference: PreTrainedModel, prompts: list[torch.Tensor]
) -> None:
    """64 tokens over two daemons are transformers' own."""
    assert greedy(client, prompts[0]) == greedy(reference, prompts[0])


def test_eight_clients_at_once(
    client: RemoteCausalLM, reference: PreTrainedModel, prompts: list[torch.Tensor]
) -> None:
    """Eight sessions of different length are batched; each gets its own tokens, and all pages come back."""
    idle = free_cache_tokens(client)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda ids: greedy(client, ids), prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        assert answer[:-NEW_TOKENS] == ids[0].tolist()
        assert is_greedy(reference, answer)
    wait_until_free(client, idle, timeout_s=10.0)


CLIENT_THAT_STREAMS = """
import sys, torch
from petalsd.client.model import RemoteCausalLM
model = RemoteCausalLM.from_pretrained(sys.argv[1], initial_peers=sys.argv[3:], dht_prefix=sys.argv[2])
class Say:
    def put(self, value): print("token", flush=True)
    def end(self): pass
model.generate(torch.tensor([[1, 2, 3, 4, 5]]), max_new_tokens=2000, min_new_tokens=2000, streamer=Say())
"""


def test_a_killed_client_frees_its_pages(client: RemoteCausalLM, demo_model: Path, swarm: list[str]) -> None:
    """A client that is killed in the middle of a stream holds no page for long."""
    idle = free_cache_tokens(client)
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT_THAT_STREAMS, str(demo_model), PREFIX, *swarm],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(5)] == ["token\n"] * 5
        assert free_cache_tokens(client) != idle
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
    wait_until_free(client, idle, timeout_s=10.0)


@pytest.mark.nightly  # tests/client/test_live_recovery.py does so with a small model
def test_a_server_killed_in_mid_generation(
    demo_model: Path,
    swarm: list[str],
    daemons: Daemons,
    reference: PreTrainedModel,
    prompts: list[torch.Tensor],
) -> None:
    """After SIGKILL to a server of the session another serves its blocks, and the tokens stay the same."""
    spares = {
        name: daemons.start(name, span, swarm) for name, span in (("a", FIRST_HALF), ("b", SECOND_HALF))
    }
    for daemon in spares.values():
        daemon.wait_for("online", START_TIMEOUT_S)
    by_peer = {daemon.peer_id: daemon for daemon in daemons.running}
    with connect(demo_model, swarm) as model, model.inference_session() as cache:
        killed: list[str] = []

        class KillAtToken:
            """Kills the server of the last blocks of the session when the tenth token comes."""

            tokens = 0

            def put(self, value: torch.Tensor) -> None:
                self.tokens += 1
                if self.tokens == 10:
                    assert cache.session is not None
                    killed.append(cache.session.route[-1].peer)
                    by_peer[killed[0]].kill()

            def end(self) -> None:
                """Nothing is left to do."""

        answer = greedy(model, prompts[1], past_key_values=cache, streamer=KillAtToken())
        assert killed
        assert cache.session is not None
        assert killed[0] not in [hop.peer for hop in cache.session.route]
    assert answer[:-NEW_TOKENS] == prompts[1][0].tolist()
    assert is_greedy(reference, answer)
