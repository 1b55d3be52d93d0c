"""A small model over servers in memory, and the oracle that computes the same blocks here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from petalsd.client.options import ClientOptions
from petalsd.client.passes import SwarmPasses
from petalsd.client.session import InferenceSession
from petalsd.client.span_session import StreamTerms
from petalsd.models.head_weights import HeadVectors, HeadWeights
from petalsd.ops.norm import rms_norm
from petalsd.types import BlockSpan
from tests.client.fake_swarm import HIDDEN, FakeSwarm, run_blocks

BLOCKS = BlockSpan(0, 6)
VOCAB = 40
OPTIONS = ClientOptions(min_backoff_s=0.001, max_step_tokens=64)
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


def make_head() -> HeadWeights:
    generator = torch.Generator().manual_seed(5)
    embed = torch.randn(VOCAB, HIDDEN, generator=generator)
    return HeadWeights(embed, embed, HeadVectors(torch.rand(HIDDEN, generator=generator) + 0.5))


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=len(BLOCKS),
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


class LocalModel(PreTrainedModel, GenerationMixin):
    """The oracle: the same blocks here, all positions computed anew for every token."""

    _supports_sdpa = True

    def __init__(self) -> None:
        super().__init__(make_config())
        self.head = make_head()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        hidden = run_blocks(BLOCKS, self.head.embed_tokens[input_ids])
        return CausalLMOutputWithPast(logits=self.logits(hidden))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        norm = self.head.vectors.norm
        assert norm is not None
        return rms_norm(hidden, norm, 1e-6) @ self.head.lm_head.T


class FakeClient:
    """A SwarmClient without a network."""

    def __init__(self, swarm: FakeSwarm) -> None:
        self.swarm = swarm
        self.passes = SwarmPasses(swarm, swarm, "tiny", BLOCKS, OPTIONS)
        self.asked_tokens: list[int] = []

    def session(self, max_tokens: int) -> InferenceSession:
        self.asked_tokens.append(max_tokens)
        return InferenceSession(self.swarm, self.swarm, StreamTerms("tiny", max_tokens, OPTIONS), BLOCKS)

    async def stop(self) -> None:
        """Nothing to leave."""
