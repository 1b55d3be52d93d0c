"""How families use the embeddings, the last norm and the output head that stand around the blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class HeadRule:
    """Around weights of Llama's form (``HeadWeights``); the defaults are Llama's own.

    embedding_scale  on what is looked up in the table
    input_scale      on what enters the first block, also when embeddings are given
    norm_offset      is added to the weight of the last norm
    logit_scale      on the logits
    logit_softcap    logits become ``softcap * tanh(logits / softcap)``
    """

    embedding_scale: float = 1.0
    input_scale: float = 1.0
    norm_offset: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def entering(self, embeds: torch.Tensor) -> torch.Tensor:
        """What enters the first block, from embeddings of any shape."""
        return embeds if self.input_scale == 1.0 else embeds * self.input_scale

    def logits(self, product: torch.Tensor) -> torch.Tensor:
        """From the product with the output head, any shape."""
        logits = product if self.logit_scale == 1.0 else product * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits


class ScaledEmbedding(nn.Embedding):
    """Scales what it looks up; the factor is rounded to the table's dtype, as in transformers."""

    def __init__(self, table: torch.Tensor, scale: float) -> None:
        super().__init__(table.shape[0], table.shape[1], _weight=table)
        self.scale = scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        looked_up = super().forward(input)
        return looked_up if self.scale == 1.0 else looked_up * looked_up.new_tensor(self.scale)
