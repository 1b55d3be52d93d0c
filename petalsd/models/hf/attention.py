"""The way from attention inside a layer of transformers to our own, over pages or without a cache.

A layer hands unknown keywords on to the attention function that its config names; so what the attention needs of
the step travels with the call, and nothing is global.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from petalsd import _C
from petalsd.ops.attention import dense_attention, paged_attention
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.kv import write_kv
from petalsd.ops.native_attention import native_attention
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.ops.score_rule import ScoreRule

ATTENTION_NAME = "petalsd"
CALL_KEYWORD = "petalsd_call"


class AttentionCall(Protocol):
    """One block's attention in one call of its layer."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rule: ScoreRule | None
    ) -> torch.Tensor:
        """q ``[B, H, n, D]`` and k, v ``[B, Hkv, n, D]`` of the new tokens; returns ``[B, n, H, D]``."""


@dataclass(frozen=True, slots=True)
class PagedCall:
    """The tokens of a ragged batch, B = 1: their keys and values are written, and read with their rows' others."""

    kv: PagedKV
    batch: RaggedBatch
    block: int
    window: int | None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rule: ScoreRule | None
    ) -> torch.Tensor:
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (q, k, v))
        write_kv(k, v, self.kv, self.batch, self.block)
        return paged_attention(q, self.kv, self.batch, self.block, scale, self.window, rule).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class NativeCall:
    """The same by the CPU's kernels, over pages in their order."""

    team: _C.LayerTeam
    kv: HeadMajorKV
    batch: RaggedBatch
    block: int
    window: int | None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rule: ScoreRule | None
    ) -> torch.Tensor:
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (q, k, v))
        place = self.block, self.window
        return native_attention(self.team, (q, k, v), self.kv, self.batch, place, scale, rule).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class DenseCall:
    """Whole sequences from position 0."""

    window: int | None

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, rule: ScoreRule | None
    ) -> torch.Tensor:
        return dense_attention(q, k, v, scale, self.window, rule).transpose(1, 2)


def register_attention() -> None:
    """Make ``ATTENTION_NAME`` known to transformers; harmless when repeated.

    Imported here: transformers' masks load torch's compiler, which takes half as long as all else that a daemon
    imports, and the families with a fused block need neither.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. The window is not taken from here: not all families name it, all masks have it."""
    call: AttentionCall = others[CALL_KEYWORD]
    softcap, sinks = others.get("softcap"), others.get("s_aux")
    rule = None if softcap is None and sinks is None else ScoreRule(softcap=softcap, sinks=sinks)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Heads of latent attention have values of another size than keys; pages have one.
    size, value_size = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    q, k, v = (_with_zeros(states, size) for states in (query, key, value))
    return call.attend(q, k, v, scale, rule)[..., :value_size], None


def _with_zeros(states: torch.Tensor, size: int) -> torch.Tensor:
    """Heads of ``size``, which change neither scores nor what is added up."""
    missing = size - states.shape[-1]
    return functional.pad(states, (0, missing)) if missing else states


def _no_mask(*_: Any, **__: Any) -> None:
    """Which keys a token sees is known from the batch."""
