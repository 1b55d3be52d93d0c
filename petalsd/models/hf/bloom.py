"""BLOOM's attention over pages; transformers has no hook for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.bloom.modeling_bloom import BloomAttention

from petalsd.models.hf.attention import AttentionCall
from petalsd.models.hf.linear_biases import bloom_rule
from petalsd.ops.score_rule import ScoreRule


class BloomPagedAttention(BloomAttention):  # type: ignore[misc]  # transformers ships no types here
    """The same modules; what comes as ``layer_past`` attends."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._rule: ScoreRule | None = None

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, *, layer_past: AttentionCall, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states and residual ``[B, n, M]``; the attention's output plus the residual."""
        if self._rule is None:
            self._rule = bloom_rule(self.num_heads, hidden_states.device)
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        attended = layer_past.attend(q, k, v, self.inv_norm_factor, self._rule)
        return residual + self.dense(attended.flatten(-2)), None
