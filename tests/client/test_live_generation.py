"""Generation through real servers on loopback equals transformers' own, token by token."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from petalsd.client.model import RemoteCausalLM
from petalsd.client.options import ClientOptions
from petalsd.client.runtime import ClientRuntime
from petalsd.client.swarm_client import SwarmClient
from petalsd.swarm.identity import ensure_identity
from tests.client.live_server import PREFIX, LiveServer, in_threads
from tests.tiers import nightly_except
from tests.tiny_models import FAMILIES, LAYER_VARIANTS, make_tiny

pytestmark = pytest.mark.swarm

NEW_TOKENS = 24
ALIKE = {
    "apertus", "arcee", "cohere2_moe", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "glm", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hyperclovax", "jais2", "mellum", "minimax_m2", "ministral", "ministral3", "phimoe", "seed_oss",
    "solar_open", "vaultgemma",
}  # fmt: skip
"""Families with nothing between client and server that no other has; blocks and heads are compared elsewhere."""
OTHERS = [name for name, (family, _) in LAYER_VARIANTS.items() if name == family and family not in ALIKE]


def prompt(seed: int, tokens: int = 9, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def connect(path: Path, servers: list[LiveServer], **options: object) -> RemoteCausalLM:
    settings = ClientOptions(**options)  # type: ignore[arg-type]
    return RemoteCausalLM.from_pretrained(
        path, initial_peers=[servers[0].maddr], dht_prefix=PREFIX, options=settings
    )


def check_idle(servers: list[LiveServer]) -> None:
    """All pages come back when the servers have heard of the end; the book-keeping is sound."""
    deadline_s = time.monotonic() + 10.0
    for server in servers:
        while (stats := server.pool.stats()).sessions > 0:
            assert time.monotonic() < deadline_s, f"{stats.sessions} session(s) are still open"
            time.sleep(0.01)
        assert stats.pages_reserved == 0
        server.pool.check_integrity()


@pytest.mark.parametrize(
    "family",
    nightly_except([*FAMILIES, *OTHERS], "llama", "bloom", "mixtral", "gpt_oss"),
)
def test_families(family: str, tmp_path: Path) -> None:
    """Each family over two servers, greedy, beyond its sliding window."""
    reference = make_tiny(family, tmp_path, **dict(LAYER_VARIANTS.get(family, (family, {}))[1]))
    ids = prompt(1, tokens=20)
    with in_threads(tmp_path, "0:2", "2:4") as servers:
        with connect(tmp_path, servers) as model:
            output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert [str(span.span) for span in model.client.manager.spans] in (["0:2", "2:4"], ["2:4", "0:2"])
        check_idle(servers)
    expected = reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == expected.tolist()


@pytest.mark.parametrize("family", nightly_except(["llama", "opt", "bloom", "gemma3_text"], "llama", "bloom"))
def test_texts_of_different_lengths(family: str, tmp_path: Path) -> None:
    """Rotated, learned and biased positions count without padding; greedy and beams are transformers' own."""
    reference = make_tiny(family, tmp_path, **dict(LAYER_VARIANTS.get(family, (family, {}))[1]))
    ids, mask = prompt(6, tokens=20, rows=3), torch.ones(3, 20, dtype=torch.int64)
    mask[0, :13], mask[2, :5] = 0, 0
    with in_threads(tmp_path, "0:2", "2:4") as servers:
        with connect(tmp_path, servers) as model:
            for beams in (1, 2):
                settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": beams}
                output = model.generate(ids, attention_mask=mask, **settings)
                assert output.tolist() == reference.generate(ids, attention_mask=mask, **settings).tolist()
        check_idle(servers)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotations_that_depend_on_length(rope: str, tmp_path: Path) -> None:
    """Past the original length too, where cut or merged steps would give other numbers."""
    reference = make_tiny("llama", tmp_path, rope=rope, max_position_embeddings=32)
    ids = prompt(2, tokens=26)
    with in_threads(tmp_path, "0:4") as servers, connect(tmp_path, servers, max_step_tokens=5) as model:
        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == expected.tolist()


def test_servers_hand_steps_to_each_other(tmp_path: Path) -> None:
    """The same tokens, also after a rollback; the first two of three servers hand on all steps but the first."""
    reference = make_tiny("llama", tmp_path)
    ids = prompt(4, tokens=20)
    expected = reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    with (
        in_threads(tmp_path, "0:1", "1:3", "3:4") as servers,
        connect(tmp_path, servers, relay_above_s=0.0) as model,
        model.inference_session(max_tokens=64) as cache,
    ):
        for _ in range(2):
            output = model.generate(ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert output.tolist() == expected.tolist()
            cache.position = 12
    first, second, last = (server.pushes.arrived for server in servers)
    assert len(first) == len(second) >= 2 * (NEW_TOKENS - 1)
    assert all(first) and all(second) and not last


class Llama:
    """A tiny Llama, its reference, three servers of overlapping spans and a client: shared by the tests below."""

    def __init__(self, reference: PreTrainedModel, model: RemoteCausalLM, servers: list[LiveServer]) -> None:
        self.reference = reference
        self.model = model
        self.servers = servers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    path = tmp_path_factory.mktemp("llama")
    reference = make_tiny("llama", path)
    with (
        in_threads(path, "0:2", "1:3", "2:4") as servers,
        connect(path, servers, max_step_tokens=16) as model,
    ):
        yield Llama(reference, model, servers)
        check_idle(servers)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "sampling", "beams", "assisted"],
)
def test_kinds_of_generation(llama: Llama, settings: dict[str, object]) -> None:
    """Prefill in several messages, decoding, reordering and rollback on real caches."""
    ids = prompt(3, tokens=4).repeat(1, 6)
    torch.manual_seed(0)
    output = llama.model.generate(ids, max_new_tokens=NEW_TOKENS, **settings)
    torch.manual_seed(0)
    expected = llama.reference.generate(ids, max_new_tokens=NEW_TOKENS, **settings)
    assert output.tolist() == expected.tolist()


def test_eight_at_once(llama: Llama) -> None:
    """Eight generations share the servers' batches; each gives its own tokens."""
    prompts = [prompt(10 + i, tokens=5 + 3 * i) for i in range(8)]
    outputs: dict[int, list[list[int]]] = {}

    def generate(index: int) -> None:
        ids = prompts[index]
        outputs[index] = llama.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False).tolist()

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for index, ids in enumerate(prompts):
        expected = llama.reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert outputs[index] == expected.tolist()


def test_rows_of_one_session(llama: Llama) -> None:
    """A batch of prompts of one length."""
    ids = prompt(4, rows=3)
    output = llama.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = llama.reference.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == expected.tolist()


def test_a_session_rolled_back(llama: Llama) -> None:
    """After ``position = p`` the session continues from there."""
    ids, other = prompt(5), prompt(6, tokens=4)
    with llama.model.inference_session(max_tokens=80) as cache:
        first = llama.model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
        cache.position = 12
        branch = torch.cat([first[:, :12], other], dim=1)
        output = llama.model.generate(branch, past_key_values=cache, max_new_tokens=10, do_sample=False)
    expected = llama.reference.generate(branch, max_new_tokens=10, do_sample=False)
    assert output.tolist() == expected.tolist()


def test_loss_and_gradients(llama: Llama) -> None:
    """A call without cache trains what stands before the blocks."""
    ids = prompt(7, rows=3)
    embeds = llama.reference.get_input_embeddings()(ids).detach()
    here, there = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    expected = llama.reference(inputs_embeds=here, labels=ids, use_cache=False)
    expected.loss.backward()
    result = llama.model(inputs_embeds=there, labels=ids)
    result.loss.backward()
    torch.testing.assert_close(result.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(there.grad, here.grad, atol=1e-4, rtol=1e-3)


def test_gradients_of_any_size_through_float16(tmp_path: Path) -> None:
    """Of a loss as small as one over many tokens is, and as large as a scaled one, through a narrow range."""
    reference, ids = make_tiny("llama", tmp_path), prompt(7, rows=3)
    embeds = reference.get_input_embeddings()(ids).detach()
    expected = embeds.clone().requires_grad_()
    reference(inputs_embeds=expected, labels=ids, use_cache=False).loss.backward()
    with (
        in_threads(tmp_path, "0:2", "2:4", dtype=torch.float16) as servers,
        connect(tmp_path, servers, recovery_timeout_s=5.0) as model,
    ):
        for scale in (2.0**-20, 1.0, 2.0**30):
            inputs = embeds.clone().requires_grad_()
            (model(inputs_embeds=inputs, labels=ids).loss * scale).backward()
            error = (inputs.grad / scale - expected.grad).norm() / expected.grad.norm()
            assert error < 0.01, f"scaled by {scale:g}"


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite(llama: Llama, value: float) -> None:
    """As when a scaled loss overflows: the scaler finds it and skips the step; no server is asked, or blamed."""
    ids = prompt(7, rows=3)
    inputs = llama.reference.get_input_embeddings()(ids).detach().requires_grad_()
    (llama.model(inputs_embeds=inputs, labels=ids).loss * value).backward()
    assert inputs.grad is not None and inputs.grad.isnan().all()


def test_hidden_states_after_the_blocks(llama: Llama) -> None:
    """Logits of one prefill are within 1e-4 of transformers'."""
    ids = prompt(8, tokens=40)
    with torch.no_grad(), llama.model.inference_session(max_tokens=40) as cache:
        actual = llama.model(ids, past_key_values=cache).logits
        expected = llama.reference(ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_an_interrupt_at_the_end_of_joining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun until then ends, the libp2p daemon included."""
    make_tiny("llama", tmp_path)
    run, runtimes, clients = ClientRuntime.run, [], []

    def interrupted(self: ClientRuntime, job: Coroutine[Any, Any, Any]) -> None:
        run(self, job)
        if self not in runtimes:
            runtimes.append(self)
            raise KeyboardInterrupt

    class NotedClient(SwarmClient):
        async def start(self) -> None:
            clients.append(self)
            await super().start()

    with in_threads(tmp_path, "0:4") as servers:
        monkeypatch.setattr("petalsd.client.model.SwarmClient", NotedClient)
        monkeypatch.setattr(ClientRuntime, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            connect(tmp_path, servers)
        monkeypatch.undo()
    assert not runtimes[0].is_running and not clients[0].node._daemon.is_alive
    assert clients[0].node._daemon._child is None


def test_a_model_that_is_dropped_leaves(tmp_path: Path) -> None:
    """Its thread and its libp2p daemon end, as in ``close``, and a fork of the process ends neither before."""
    make_tiny("llama", tmp_path)
    with in_threads(tmp_path, "0:4") as servers:
        model = connect(tmp_path, servers)
        if (child := os.fork()) == 0:
            model.close()
            del model
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert model.generate(prompt(1), max_new_tokens=2).shape == (1, 11)
        thread, daemon = model.runtime._thread, model.client.node._daemon
        del model
        gc.collect()
        thread.join(20)
        assert not thread.is_alive() and not daemon.is_alive


def test_a_client_that_keeps_its_key_keeps_its_peer_id(tmp_path: Path) -> None:
    """By it servers may know their clients; without a file it is another one each time."""
    make_tiny("llama", tmp_path)
    key = tmp_path / "client.key"
    with in_threads(tmp_path, "0:4") as servers:
        peers = []
        for identity_path in (key, key, None):
            with connect(tmp_path, servers, identity_path=identity_path) as model:
                peers.append(model.client.node.peer_id)
    assert peers[0] == peers[1] == ensure_identity(key) != peers[2]
