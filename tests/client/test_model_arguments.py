"""What transformers takes and a swarm cannot do as asked is refused; the rest gives transformers' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from petalsd.client.arguments import named_dtype
from petalsd.client.model import RemoteCausalLM
from petalsd.errors import BadRequest
from tests.client.fake_model import PROMPT, LocalModel
from tests.client.fake_swarm import FakeSwarm

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
LONGER = torch.cat([PROMPT, PROMPT, PROMPT], dim=1)


def test_embeddings_always_take_a_session(model: RemoteCausalLM, local: LocalModel) -> None:
    """transformers feeds single tokens after them in any case: without a session each would stand alone."""
    expected = local.generate(PROMPT, use_cache=False, **GREEDY)[:, PROMPT.shape[1] :]
    embeds = model.get_input_embeddings()(PROMPT)
    for use_cache in (True, False):
        output = model.generate(inputs_embeds=embeds, use_cache=use_cache, **GREEDY)
        assert output.tolist() == expected.tolist()


def test_embeddings_that_the_session_holds_already_are_refused(model: RemoteCausalLM) -> None:
    """As a text would be: the last of them would be fed once more."""
    embeds = model.get_input_embeddings()(PROMPT)
    with model.inference_session(max_tokens=40) as cache:
        model.generate(inputs_embeds=embeds, past_key_values=cache, **GREEDY)
        with pytest.raises(BadRequest, match=r"inputs_embeds = \(1, 5, 8\): give the whole text"):
            model.generate(inputs_embeds=embeds, past_key_values=cache, **GREEDY)


def test_a_session_and_no_cache_is_no_sense(model: RemoteCausalLM, swarm: FakeSwarm) -> None:
    """The whole text would be fed behind itself for each token."""
    plain = {**GREEDY, "use_cache": False}
    with model.inference_session(max_tokens=400) as cache:
        for settings in (plain, {"generation_config": GenerationConfig(**plain)}):
            with pytest.raises(BadRequest, match="use_cache = False: a session is a cache"):
                model.generate(PROMPT, past_key_values=cache, **settings)
    expected = model.generate(PROMPT, **GREEDY)
    model.generation_config.use_cache = False
    swarm.servers["a"].messages.clear()
    assert model.generate(PROMPT, past_key_values=None, **GREEDY).tolist() == expected.tolist()
    assert not swarm.servers["a"].messages


def test_only_the_new_part_of_a_text(model: RemoteCausalLM, local: LocalModel) -> None:
    """transformers takes it by a mask over all, however long the part is."""
    with model.inference_session(max_tokens=60) as cache:
        text = model.generate(PROMPT, past_key_values=cache, **GREEDY)
        held = text[:, : cache.position]
        for new in (PROMPT[:, :2], LONGER):
            mask = torch.ones(1, cache.position + new.shape[1], dtype=torch.int64)
            output = model.generate(new, attention_mask=mask, past_key_values=cache, **GREEDY)
            expected = local.generate(torch.cat([held, new], dim=1), use_cache=False, **GREEDY)
            assert output.tolist() == expected[:, held.shape[1] :].tolist()
            cache.position = held.shape[1]
        with pytest.raises(BadRequest, match=r"or what the session holds \(8 tokens\) and 15 new ones"):
            model.generate(LONGER, attention_mask=mask[:, :20], past_key_values=cache, **GREEDY)


def test_assistance_is_for_empty_sessions(model: RemoteCausalLM, local: LocalModel) -> None:
    """Its first step feeds the whole text; rolled back to nothing, a session takes it."""
    settings = {**GREEDY, "prompt_lookup_num_tokens": 2}
    with model.inference_session(max_tokens=60) as cache:
        model.generate(PROMPT, past_key_values=cache, **settings)
        with pytest.raises(BadRequest, match="assign position = 0"):
            model.generate(LONGER, past_key_values=cache, **settings)
        cache.position = 0
        output = model.generate(LONGER, past_key_values=cache, **settings)
    assert output.tolist() == local.generate(LONGER, use_cache=False, **GREEDY).tolist()


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"cache_implementation": "paged"}, "cache_implementation = 'paged': the servers hold the cache"),
        ({"cache_implementation": "static"}, "cache_implementation = 'static': the servers hold the cache"),
        ({"assistant_early_exit": 1}, "assistant_early_exit = 1: all blocks run on the servers"),
        ({"inputs": PROMPT[:, :0]}, r"input_ids = \(1, 0\): its shape is \[rows, tokens\], one or more"),
        ({"inputs": PROMPT[0]}, r"input_ids = \(5,\): its shape is \[rows, tokens\]"),
        ({"position_ids": torch.arange(2, 7)[None]}, "they count up from 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_generations_that_are_refused(model: RemoteCausalLM, settings: dict[str, Any], rule: str) -> None:
    """Before anything is computed, and by name."""
    with pytest.raises(BadRequest, match=rule):
        model.generate(**{"inputs": PROMPT, **GREEDY, **settings})


def test_remote_assistants_are_refused(model: RemoteCausalLM) -> None:
    """Their sessions would have to last over the calls that the generation makes."""
    with pytest.raises(BadRequest, match="assistant_model = 'RemoteCausalLM'"):
        model.generate(PROMPT, assistant_model=model, **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, r"attention_mask = \(1, 1, 5, 5\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask = \(1, 3\): .* a step of 5 tokens"),
        ({"input_ids": PROMPT[0]}, r"input_ids = \(5,\): its shape is \[rows, tokens\]"),
        ({"input_ids": None, "inputs_embeds": torch.ones(5, 8)}, r"its shape is \[rows, tokens, hidden\]"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids = \(1, 4\)"),
        ({"use_cache": True}, r"use_cache = True: pass past_key_values=model\.inference_session"),
        ({"output_router_logits": True}, "output_router_logits = True"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_calls_that_are_refused(
    model: RemoteCausalLM, swarm: FakeSwarm, arguments: dict[str, Any], rule: str
) -> None:
    """Here: a server that is asked for nonsense would be avoided for it."""
    with pytest.raises(BadRequest, match=rule):
        model(**{"input_ids": PROMPT, **arguments})
    assert not swarm.servers["a"].passes


def test_positions_that_say_what_is_so(model: RemoteCausalLM) -> None:
    """They may be given, in a session and without."""
    expected = model.generate(PROMPT, **GREEDY)
    positions = torch.arange(5)[None]
    assert model.generate(PROMPT, position_ids=positions, **GREEDY).tolist() == expected.tolist()
    with torch.no_grad():
        logits = model(PROMPT, position_ids=positions).logits
    torch.testing.assert_close(logits[:, -1].argmax(), expected[0, 5])


def test_a_session_gives_no_gradients(model: RemoteCausalLM) -> None:
    """They would be missing without a word."""
    embeds = model.get_input_embeddings()(PROMPT).clone().requires_grad_()
    with model.inference_session(max_tokens=20) as cache:
        with pytest.raises(BadRequest, match=r"under torch\.no_grad\(\)"):
            model(inputs_embeds=embeds, past_key_values=cache)
        with torch.no_grad():
            assert model(inputs_embeds=embeds, past_key_values=cache).logits.shape == (1, 5, 40)


@pytest.mark.parametrize("peers", [[], "/ip4/1.2.3.4/tcp/1/p2p/Qm", ["1.2.3.4"], ["/ip4/1.2.3.4/tcp/1"]])
def test_a_client_needs_addresses_of_peers(peers: Any) -> None:
    """Without any it would wait for servers in vain."""
    with pytest.raises(BadRequest, match="initial_peers = "):
        RemoteCausalLM.from_pretrained("/nowhere", initial_peers=peers)


def test_dtypes_by_name() -> None:
    """As in transformers."""
    assert named_dtype("bfloat16") is named_dtype(torch.bfloat16) is torch.bfloat16
    assert named_dtype("auto") is named_dtype(None) is None
    for dtype in ("bf16", "int8", torch.int8, "nn"):
        with pytest.raises(BadRequest, match="dtype = "):
            named_dtype(dtype)


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_session_has_room_for_something(model: RemoteCausalLM, tokens: int) -> None:
    """Zero is not taken for unset."""
    with pytest.raises(BadRequest, match=f"max_tokens = {tokens}"):
        model.inference_session(tokens)


def test_rows_of_a_session_stay(model: RemoteCausalLM) -> None:
    """What transformers does with rows of its own caches would do nothing here; more than all may be forgotten."""
    with model.inference_session(max_tokens=20) as cache:
        with torch.no_grad():
            model(torch.cat([PROMPT, PROMPT + 1]), past_key_values=cache)
        for change in (
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([1, 0])),
            lambda: cache.crop(3),
        ):
            with pytest.raises(BadRequest):
                change()
        cache.crop(-2)
        assert cache.position == 3
        cache.crop(-9)
        assert cache.position == 0


def test_what_needs_the_whole_model_is_refused(model: RemoteCausalLM, tmp_path: Path) -> None:
    """A checkpoint of one norm, or an engine over a cache that nobody fills, is of no use."""
    with pytest.raises(NotImplementedError, match="copy what it was loaded from"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(NotImplementedError, match="call generate"):
        model.generate_batch([[1, 2]])
    assert not (tmp_path / "saved").exists()
