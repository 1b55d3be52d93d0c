"""Falcon's attention over pages; transformers has no hook for it, and caches keys once for every query head."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from petalsd.models.hf.attention import AttentionCall
from petalsd.models.hf.linear_biases import falcon_rule
from petalsd.ops.score_rule import ScoreRule


class FalconPagedAttention(FalconAttention):  # type: ignore[misc]  # transformers ships no types here
    """The same modules; what comes as ``layer_past`` attends."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._rule: ScoreRule | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        layer_past: AttentionCall,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states ``[B, n, M]``; the attention's output."""
        q, k, v = (part.transpose(1, 2) for part in self._split(self.query_key_value(hidden_states)))
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        elif self._rule is None:
            self._rule = falcon_rule(self.num_heads, self.inv_norm_factor, hidden_states.device)
        attended = layer_past.attend(q, k, v, self.inv_norm_factor, self._rule)
        return self.dense(attended.flatten(-2)), None

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[B, n, …]``, each KV head after its query heads, to q ``[B, n, H, D]`` and k, v ``[B, n, Hkv, D]``."""
        groups = self.num_heads // self.num_kv_heads
        grouped = qkv.view(*qkv.shape[:-1], self.num_kv_heads, groups + 2, self.head_dim)
        return grouped[..., :-2, :].flatten(-3, -2), grouped[..., -2, :], grouped[..., -1, :]
