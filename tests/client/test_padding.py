"""Texts of different lengths in one batch: each is computed as if it stood alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from petalsd.client.model import RemoteCausalLM
from petalsd.client.padding import check_positions, moved_back, moved_left, read_padding
from petalsd.errors import BadRequest, RemoteFailure
from tests.client.fake_model import LocalModel
from tests.client.fake_swarm import FakeServer, FakeSwarm, dies_at, make_span, refuses_from

TEXTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8], [7]]
IDS = torch.tensor([[0] * (5 - len(text)) + text for text in TEXTS])
MASK = torch.tensor([[0] * (5 - len(text)) + [1] * len(text) for text in TEXTS])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def alone(texts: list[list[int]], **settings: Any) -> list[list[int]]:
    """What the oracle adds to each text by itself."""
    local = LocalModel().eval()
    outputs: list[list[int]] = []
    for text in texts:
        ids = torch.tensor([text])
        added = local.generate(ids, use_cache=False, **{**GREEDY, **settings})[:, len(text) :]
        outputs += added.tolist()
    return outputs


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str
)
def test_every_text_gets_what_it_gets_alone(
    model: RemoteCausalLM, swarm: FakeSwarm, settings: dict[str, Any]
) -> None:
    """No server sees padding, and rows of equal length are one session."""
    output = model.generate(IDS, attention_mask=MASK, **GREEDY, **settings)
    assert output[:, 5:].tolist() == alone(TEXTS, **settings)
    beams = settings.get("num_beams", 1)
    shapes = [tuple(message.hidden.shape[:2]) for message in swarm.servers["a"].messages[:3]]
    assert sorted(shapes) == [(beams, 1), (beams, 2), (2 * beams, 5)]
    assert sorted(model.client.asked_tokens) == [7, 8, 11]


def test_without_a_cache(model: RemoteCausalLM) -> None:
    """Each token by a pass over the texts, with their padding behind them."""
    output = model.generate(IDS, attention_mask=MASK, use_cache=False, **GREEDY)
    assert output[:, 5:].tolist() == alone(TEXTS)


def test_a_session_goes_on(model: RemoteCausalLM) -> None:
    """With the whole texts, with new parts alone, and after a rollback into the padding of some."""
    longer = torch.cat([IDS, torch.full((4, 2), 7)], dim=1)
    mask = torch.cat([MASK, torch.ones(4, 2, dtype=torch.int64)], dim=1)
    expected = alone([[*text, 7, 7] for text in TEXTS])
    with model.inference_session(max_tokens=40) as cache:
        model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY)
        for position in (5, 6, 2, 0):
            cache.position = position
            output = model.generate(longer, attention_mask=mask, past_key_values=cache, **GREEDY)
            assert output[:, 7:].tolist() == expected
        assert cache.session is not None
        assert [hop.peer for hop in cache.session.route] == ["a", "b"] * 3
        cache.position = 5
        with torch.no_grad():
            logits = model(torch.full((4, 2), 7), past_key_values=cache).logits
        assert cache.position == 7
        assert logits[:, -1].argmax(-1).tolist() == [text[0] for text in expected]


def test_a_server_that_dies_is_replaced_for_all(model: RemoteCausalLM, swarm: FakeSwarm) -> None:
    swarm.servers["c"] = FakeServer(make_span("c", 2, 6))
    swarm.servers["b"].before_step = dies_at(8)
    output = model.generate(IDS, attention_mask=MASK, **GREEDY)
    assert output[:, 5:].tolist() == alone(TEXTS)
    swarm.servers["b"].open_streams = 0


def test_a_step_that_fails_for_some_rows_leaves_all_where_they_were(
    model: RemoteCausalLM, swarm: FakeSwarm
) -> None:
    """It can be sent once more."""
    expected = alone(TEXTS)
    with model.inference_session(max_tokens=40) as cache:
        with torch.no_grad():
            first = model(IDS, attention_mask=MASK, past_key_values=cache).logits[:, -1:].argmax(-1)
            swarm.servers["a"].before_step = refuses_from(5, "bad_request: it says no")
            with pytest.raises(RemoteFailure, match="it says no"):
                model(first, past_key_values=cache)
            assert cache.position == 5
            swarm.servers["a"].before_step = None
            swarm.failures.clear()
            second = model(first, past_key_values=cache).logits[:, -1:].argmax(-1)
        assert torch.cat([first, second], dim=1).tolist() == [text[:2] for text in expected]


def test_passes_with_padding_before_and_after(model: RemoteCausalLM) -> None:
    """Logits and gradients of every text are those that it has alone."""
    right = torch.tensor([text + [0] * (5 - len(text)) for text in TEXTS])
    for ids, mask in ((IDS, MASK), (right, MASK.flip(1))):
        embeds = model.get_input_embeddings()(ids).clone().requires_grad_()
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits
        logits[mask == 1].square().sum().backward()
        for row, text in enumerate(TEXTS):
            one = model.get_input_embeddings()(torch.tensor([text])).clone().requires_grad_()
            expected = model(inputs_embeds=one).logits
            expected.square().sum().backward()
            is_text = mask[row] == 1
            torch.testing.assert_close(logits[row, is_text], expected[0])
            torch.testing.assert_close(embeds.grad[row, is_text], one.grad[0])
            assert embeds.grad[row, ~is_text].count_nonzero() == 0


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        ([[1, 0, 1], [1, 1, 1]], "each row is one text"),
        ([[0, 0, 0], [1, 1, 1]], "each row is one text"),
        ([[0, 2, 2], [1, 1, 1]], "each row is one text"),
        ([[1, 1, 0], [1, 1, 1]], "padding only before it"),
    ],
)
def test_what_is_no_padding_is_refused(model: RemoteCausalLM, mask: list[list[int]], rule: str) -> None:
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    with model.inference_session(max_tokens=9) as cache, pytest.raises(BadRequest, match=rule):
        model(ids, attention_mask=torch.tensor(mask), past_key_values=cache)


def test_padding_stays(model: RemoteCausalLM) -> None:
    """What a session's rows begin with cannot change."""
    ones = torch.ones_like(MASK)
    with torch.no_grad(), model.inference_session(max_tokens=9) as cache:
        model(IDS, attention_mask=MASK, past_key_values=cache)
        with pytest.raises(BadRequest, match=r"begin with \(0, 3, 0, 4\) tokens of padding, and stay so"):
            model(IDS[:, :1], attention_mask=torch.ones(4, 6), past_key_values=cache)
        model(IDS[:, :1], attention_mask=ones[:, :1], past_key_values=cache)
    with torch.no_grad(), model.inference_session(max_tokens=20) as cache:
        model(IDS, attention_mask=ones, past_key_values=cache)
        with pytest.raises(BadRequest, match="begin with no tokens of padding"):
            model(IDS, attention_mask=torch.cat([MASK, ones], dim=1), past_key_values=cache)


def test_rows_of_other_lengths_do_not_change_places(model: RemoteCausalLM) -> None:
    """Beams never do: those of a prompt are equally long. Sessions are as before."""
    with torch.no_grad(), model.inference_session(max_tokens=20) as cache:
        model(IDS, attention_mask=MASK, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 1, 2, 3]))
        with pytest.raises(
            BadRequest, match=r"hypo_ids = \(1, 1, 2, 3\): a row goes on from one that begins"
        ):
            model(IDS[:, :1], past_key_values=cache)


def test_a_mask_tells_how_rows_begin() -> None:
    assert read_padding(None, 3, 1, ends=False) is None
    assert read_padding(MASK, 0, 5, ends=False) == (0, 3, 0, 4)
    assert read_padding(torch.ones(2, 1), 4, 1, ends=False) is None
    assert read_padding(torch.ones(2, 5), 4, 1, ends=False) == (0, 0)
    assert read_padding(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]), 0, 4, ends=True) == (1, 0)
    states = torch.arange(20.0).view(4, 5, 1)
    moved = moved_left(states, (0, 3, 0, 4))
    assert moved[1, :, 0].tolist() == [8, 9, 5, 6, 7]
    assert torch.equal(moved_back(moved, (0, 3, 0, 4)), states)


def test_positions_count_without_padding() -> None:
    """Those of padding itself may be anything."""
    check_positions(torch.tensor([[0, 1, 2], [1, 0, 1]]), 0, 3, (0, 1))
    check_positions(torch.tensor([[3], [2]]), 3, 1, (0, 1))
    for ids, padding in ((torch.tensor([[0, 1, 2], [0, 1, 2]]), (0, 1)), (torch.tensor([[1, 2, 3]]), None)):
        with pytest.raises(BadRequest, match="position_ids"):
            check_positions(ids, 0, 3, padding)
