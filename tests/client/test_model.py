"""RemoteCausalLM over servers in memory: transformers' generation gives what it gives with local blocks."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.loss.loss_utils import ForCausalLMLoss

from petalsd.client.cache import RemoteCache
from petalsd.client.model import RemoteCausalLM, read_generation_config
from petalsd.errors import BadRequest, WeightsError
from petalsd.models.source import ModelSource
from tests.client.fake_model import BLOCKS, PROMPT, VOCAB, LocalModel, make_config
from tests.client.fake_swarm import FakeServer, FakeSwarm, dies_at, make_span, run_blocks
from tests.tiny_models import make_tiny


def test_greedy_generation(model: RemoteCausalLM, local: LocalModel, swarm: FakeSwarm) -> None:
    """Token by token the local model's, with one message per server and token after the prompt."""
    output = model.generate(PROMPT, max_new_tokens=12, do_sample=False)
    expected = local.generate(PROMPT, max_new_tokens=12, do_sample=False, use_cache=False)
    assert output.tolist() == expected.tolist()
    lengths = [message.hidden.shape[1] for message in swarm.servers["b"].messages]
    assert lengths == [5] + [1] * 11
    assert model.client.asked_tokens == [17]


def test_sampling_with_a_seed(model: RemoteCausalLM, local: LocalModel) -> None:
    """The same random numbers choose the same tokens."""
    settings = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.8, "top_k": 12}
    torch.manual_seed(3)
    output = model.generate(PROMPT, **settings)
    torch.manual_seed(3)
    assert output.tolist() == local.generate(PROMPT, use_cache=False, **settings).tolist()


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search(model: RemoteCausalLM, local: LocalModel, beams: int) -> None:
    """Rows are reordered on the servers."""
    settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    output = model.generate(PROMPT, **settings)
    assert output.tolist() == local.generate(PROMPT, use_cache=False, **settings).tolist()


def test_beam_search_over_a_dying_server(model: RemoteCausalLM, local: LocalModel, swarm: FakeSwarm) -> None:
    """The replacement continues all beams."""
    swarm.servers["c"] = FakeServer(make_span("c", 2, 6))
    swarm.servers["b"].before_step = dies_at(5)
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    output = model.generate(PROMPT, **settings)
    assert output.tolist() == local.generate(PROMPT, use_cache=False, **settings).tolist()
    swarm.servers["b"].open_streams = 0


def test_assisted_generation_rolls_back(model: RemoteCausalLM, local: LocalModel, swarm: FakeSwarm) -> None:
    """Candidates that were rejected are cut from the servers' caches."""
    prompt = torch.tensor([[3, 1, 4, 3, 1, 4, 3, 1]])
    output = model.generate(prompt, max_new_tokens=14, do_sample=False, prompt_lookup_num_tokens=3)
    expected = local.generate(prompt, max_new_tokens=14, do_sample=False, use_cache=False)
    assert output.tolist() == expected.tolist()
    messages = swarm.servers["a"].messages
    assert any(message.hidden.shape[1] > 1 for message in messages[1:])


def test_a_batch_of_equal_rows(model: RemoteCausalLM, local: LocalModel) -> None:
    """Several prompts of one length run as one session."""
    prompts = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]])
    output = model.generate(prompts, max_new_tokens=5, do_sample=False)
    expected = local.generate(prompts, max_new_tokens=5, do_sample=False, use_cache=False)
    assert output.tolist() == expected.tolist()


def test_streamers_get_every_token(model: RemoteCausalLM) -> None:
    """The prompt first, then each token as it comes."""
    seen: list[list[int]] = []

    class Recorder(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            seen.append(value.flatten().tolist())

        def end(self) -> None:
            seen.append([])

    output = model.generate(PROMPT, max_new_tokens=4, do_sample=False, streamer=Recorder())
    assert seen == [PROMPT[0].tolist(), *([token] for token in output[0, 5:].tolist()), []]


def test_a_session_continues_over_calls(model: RemoteCausalLM, local: LocalModel, swarm: FakeSwarm) -> None:
    """The second call feeds only what is new; rolling back forgets the end."""
    with model.inference_session(max_tokens=40) as cache:
        first = model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert cache.position == 8
        longer = torch.cat([first, torch.tensor([[7, 7]])], dim=1)
        second = model.generate(longer, past_key_values=cache, max_new_tokens=3, do_sample=False)
        cache.position = 6
        again = model.generate(longer, past_key_values=cache, max_new_tokens=3, do_sample=False)
    expected = local.generate(longer, max_new_tokens=3, do_sample=False, use_cache=False)
    assert second.tolist() == again.tolist() == expected.tolist()
    assert swarm.servers["a"].messages[4].hidden.shape[1] == 3


def test_a_text_that_the_session_holds_already_is_refused(model: RemoteCausalLM) -> None:
    """A later call takes the whole text: tokens of the prompt would be fed once more, behind the answer."""
    with model.inference_session(max_tokens=40) as cache:
        model.generate(PROMPT, past_key_values=cache, max_new_tokens=4, do_sample=False)
        for given in ({"inputs": PROMPT}, {"input_ids": PROMPT}):
            with pytest.raises(BadRequest, match=r"give the whole text, what the session holds \(8 tokens\)"):
                model.generate(**given, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert cache.position == 8


def test_generation_without_a_cache_uses_passes(model: RemoteCausalLM, swarm: FakeSwarm) -> None:
    """``use_cache=False`` opens no session."""
    output = model.generate(PROMPT, max_new_tokens=3, do_sample=False, use_cache=False)
    assert output.shape == (1, 8)
    assert not swarm.servers["a"].messages and swarm.servers["a"].passes


def test_a_generation_config_may_ask_for_no_cache(model: RemoteCausalLM, swarm: FakeSwarm) -> None:
    """Like the keyword, by name or as the second argument."""
    with_cache = model.generate(PROMPT, max_new_tokens=4, do_sample=False)
    swarm.servers["b"].messages.clear()
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, use_cache=False)
    for output in (model.generate(PROMPT, settings), model.generate(PROMPT, generation_config=settings)):
        assert output.tolist() == with_cache.tolist()
    assert not swarm.servers["b"].messages


def test_what_a_checkpoint_says_of_a_cache_is_not_meant_for_servers(tmp_path: Path) -> None:
    """Fine-tuned models often say that there is none, as it was in training; that would end each generation."""
    source, config = ModelSource(str(tmp_path)), make_config()
    assert read_generation_config(source, config).use_cache is True
    stored = {"use_cache": False, "cache_implementation": "static", "eos_token_id": [7, 9]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    settings = read_generation_config(source, config)
    assert (settings.use_cache, settings.cache_implementation) == (True, None)
    assert settings.eos_token_id == [7, 9]


@pytest.mark.parametrize("text", ['{"eos_token_id": 7', "[]", '{"watermarking_config": {"x": 1}}'])
def test_a_damaged_generation_config_is_not_passed_over(tmp_path: Path, text: str) -> None:
    """Without it texts would end elsewhere, or never. It is told before the swarm is joined."""
    make_tiny("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWJ8GupPYnpoYmfvs2wbo1hc8w3WN8DEtgu1we2H79dAtE"
    with pytest.raises(WeightsError, match=r"generation_config\.json"):
        RemoteCausalLM.from_pretrained(tmp_path, initial_peers=[nobody], dht_prefix="tiny")


def test_guidance_is_for_calls_without_a_session(model: RemoteCausalLM, local: LocalModel) -> None:
    """transformers runs the model twice then, with a cache of its own that would be missing."""
    settings = {"max_new_tokens": 6, "do_sample": False, "guidance_scale": 1.8}
    with pytest.raises(BadRequest, match=r"guidance_scale = 1\.8: .*use_cache=False"):
        model.generate(PROMPT, **settings)
    output = model.generate(PROMPT, use_cache=False, **settings)
    assert output.tolist() == local.generate(PROMPT, use_cache=False, **settings).tolist()


def test_a_call_without_cache_is_differentiable(model: RemoteCausalLM, local: LocalModel) -> None:
    """Loss and gradients for what stands before the blocks; the local weights stay frozen."""
    embeds = model.get_input_embeddings()(PROMPT).clone().requires_grad_()
    result = model(inputs_embeds=embeds, labels=PROMPT)
    result.loss.backward()
    here = local.head.embed_tokens[PROMPT].clone().requires_grad_()
    logits = local.logits(run_blocks(BLOCKS, here))
    loss = nn.functional.cross_entropy(logits[0, :-1], PROMPT[0, 1:])
    loss.backward()
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(embeds.grad, here.grad)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradients_that_would_be_wrong_are_refused(model: RemoteCausalLM) -> None:
    """As by torch's own operations: the servers are sent the inputs once more for them."""
    leaf = model.get_input_embeddings()(PROMPT).clone().requires_grad_()
    embeds = leaf * 1.0
    loss = model(inputs_embeds=embeds, labels=PROMPT).loss
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
    with torch.no_grad():
        embeds.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "settings",
    [{"num_items_in_batch": 100}, {"shift_labels": PROMPT}, {"ignore_index": 4}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_loss(model: RemoteCausalLM, local: LocalModel, settings: dict[str, Any]) -> None:
    """Trainers that add up several batches count on them."""
    logits = local(PROMPT).logits
    expected = ForCausalLMLoss(logits, PROMPT, VOCAB, **settings)
    torch.testing.assert_close(model(PROMPT, labels=PROMPT, **settings).loss, expected)


def test_outputs_as_a_tuple(model: RemoteCausalLM) -> None:
    """In transformers' order."""
    loss, logits = model(PROMPT, labels=PROMPT, return_dict=False)
    assert loss.shape == () and logits.shape == (1, 5, VOCAB)


def test_threads_share_a_model(model: RemoteCausalLM, local: LocalModel) -> None:
    """Eight generations at once do not disturb each other."""
    prompts = [torch.tensor([[i + 1, 2 * i + 1, 7]]) for i in range(8)]
    outputs: dict[int, list[list[int]]] = {}

    def generate(index: int) -> None:
        outputs[index] = model.generate(prompts[index], max_new_tokens=6, do_sample=False).tolist()

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, prompt in enumerate(prompts):
        expected = local.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
        assert outputs[index] == expected.tolist()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "attention_mask"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"output_attentions": True}, "output_attentions"),
        ({"input_ids": None}, "input_ids"),
    ],
)
def test_what_remote_blocks_cannot_do_is_refused(
    model: RemoteCausalLM, arguments: dict[str, Any], field: str
) -> None:
    """Instead of computing something else."""
    with pytest.raises(BadRequest, match=field):
        model(**{"input_ids": PROMPT, **arguments})


def test_a_session_cannot_grow(model: RemoteCausalLM) -> None:
    """Servers reserve memory at the start; a generation that does not fit is refused before it runs."""
    with model.inference_session(max_tokens=8) as cache, pytest.raises(BadRequest, match="8 tokens"):
        model.generate(PROMPT, past_key_values=cache, max_new_tokens=10)


def test_closing_twice_is_closing_once(model: RemoteCausalLM) -> None:
    """The context manager may close what was closed by hand; an unused cache has nothing to close."""
    RemoteCache(model.runtime, model.client.session).close()
    model.close()
    model.close()
