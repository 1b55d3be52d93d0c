"""What stands around the blocks of a family: embeddings, the last norm, the output head, and how they are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

NormKind = Literal["rms", "layer", "none"]


@dataclass(frozen=True, slots=True)
class HeadNames:
    """Tensors of a checkpoint. Those that a family does not have are None; the defaults are Llama's.

    prefixes    what may come before all names but the output's: the first that a checkpoint uses
    embeddings  ``[V, M]``
    output      ``[V, M]``, not read where embeddings are tied
    positions   ``[P, M]``, added to the embeddings
    others      ``[M]``, output_bias ``[V]``
    """

    prefixes: tuple[str, ...] = ("model.", "")
    embeddings: str = "embed_tokens.weight"
    embedding_norm: str | None = None
    embedding_norm_bias: str | None = None
    positions: str | None = None
    norm: str | None = "norm.weight"
    norm_bias: str | None = None
    output: str = "lm_head.weight"
    output_bias: str | None = None


@dataclass(frozen=True, slots=True)
class HeadRule:
    """The defaults are Llama's own.

    embedding_scale  on what is looked up in the table
    input_scale      on what enters the first block, also when embeddings are given
    first_position   row of the position table that belongs to a sequence's first token
    norm             kind of the last norm; that of embeddings is a layer norm
    norm_eps         of both
    norm_offset      is added to the weight of the last norm
    logit_scale      on the logits
    logit_softcap    logits become ``softcap * tanh(logits / softcap)``
    """

    names: HeadNames = HeadNames()
    embedding_scale: float = 1.0
    input_scale: float = 1.0
    first_position: int = 0
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

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
