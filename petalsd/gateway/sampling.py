"""How the next token is drawn: OpenAI's settings, as processors of the logits for transformers' greedy search.

Greedy search takes the largest logit, so noise is added that makes the largest a draw: with g = -log(E), where E
is exponentially distributed, argmax(x + g) is distributed as softmax(x) (Gumbel 1954). Thus each request has a
random generator of its own; transformers' sampling has one for the whole process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature                          0: the likeliest token
    top_p, top_k                         draw among the likeliest alone; 1 and 0: among all
    presence_penalty, frequency_penalty  what a token loses that was generated before: once, and for each time
    seed                                 None: another result each time
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def processors(self, num_prompt_tokens: int) -> LogitsProcessorList:
        """For one generation behind a prompt of so many tokens."""
        found: list[LogitsProcessor] = []
        if self.presence_penalty or self.frequency_penalty:
            found.append(_Penalties(num_prompt_tokens, self.presence_penalty, self.frequency_penalty))
        if self.temperature > 0:
            found.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                found.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                found.append(TopPLogitsWarper(self.top_p))
            found.append(_Draw(self.seed))
        return LogitsProcessorList(found)


class _Draw(LogitsProcessor):  # type: ignore[misc]  # transformers ships no types here
    def __init__(self, seed: int | None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        waits = torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=self._generator)
        return scores.float() - waits.log().to(scores.device)


class _Penalties(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, num_prompt_tokens: int, presence: float, frequency: float) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._presence, self._frequency = presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores, dtype=torch.float32)
        generated = input_ids[:, self._num_prompt_tokens :]
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=torch.float32))
        return scores - self._presence * (counts > 0) - self._frequency * counts
