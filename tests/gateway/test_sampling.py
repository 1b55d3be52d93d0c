"""Drawing by processors of logits and the largest: the distribution that was asked for."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from petalsd.gateway.prompts import default_sampling
from petalsd.gateway.sampling import Sampling

LOGITS = torch.tensor([[1.0, 0.0, 2.0, -1.0]])
PROMPT = torch.tensor([[3, 3]])


def drawn(sampling: Sampling, count: int, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    """Shares of the tokens among so many draws of one generation."""
    processors = sampling.processors(num_prompt_tokens=2)
    tokens = torch.stack([processors(ids, LOGITS.clone()).argmax(-1)[0] for _ in range(count)])
    return torch.bincount(tokens, minlength=LOGITS.shape[1]) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_distribution_is_the_softmax(temperature: float) -> None:
    expected = (LOGITS[0] / temperature).softmax(-1)
    shares = drawn(Sampling(temperature=temperature, seed=1), 4000)
    assert torch.allclose(shares, expected, atol=0.03)


def test_only_the_likeliest_are_drawn() -> None:
    assert (drawn(Sampling(top_k=2, seed=1), 500) > 0).tolist() == [True, False, True, False]
    assert (drawn(Sampling(top_p=0.6, seed=1), 500) > 0).tolist() == [False, False, True, False]


def test_temperature_0_draws_nothing() -> None:
    assert drawn(Sampling(temperature=0, top_p=0.5, top_k=3), 20).tolist() == [0, 0, 1, 0]


def test_a_seed_repeats_and_none_does_not() -> None:
    def tokens(seed: int | None) -> list[int]:
        processors = Sampling(seed=seed).processors(2)
        return [int(processors(PROMPT, LOGITS.clone()).argmax()) for _ in range(50)]

    assert tokens(7) == tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_penalties_count_what_was_generated() -> None:
    """Not the prompt; once for having been there, and for each time."""
    ids = torch.tensor([[3, 3, 2, 2, 1]])
    sampling = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    scores = sampling.processors(2)(ids, LOGITS.clone())
    assert scores.tolist() == [[1.0, -0.75, 1.0, -1.0]]


def test_defaults_are_the_models_where_it_says_that_tokens_are_drawn() -> None:
    assert default_sampling(GenerationConfig(temperature=0.3)) == Sampling()
    own = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=None)
    assert default_sampling(own) == Sampling(temperature=0.6, top_p=0.9)
