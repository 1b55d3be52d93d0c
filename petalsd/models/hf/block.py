"""A decoder layer of transformers as a block of the engine."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from petalsd import _C
from petalsd.models.contract import Angles, Block
from petalsd.models.hf.adapted_linear import adapt_layer
from petalsd.models.hf.attention import CALL_KEYWORD, AttentionCall, DenseCall, NativeCall, PagedCall
from petalsd.models.hf.experts import experts_are_capturable
from petalsd.models.hf.packing import layer_nbytes
from petalsd.models.hf.stand_ins import leave_kernels
from petalsd.models.model_config import ModelConfig
from petalsd.models.paged_span import CosSin
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.low_rank import LowRankUpdate
from petalsd.ops.ragged import PagedKV, RaggedBatch

if TYPE_CHECKING:
    from petalsd.ops.attention_rule import AttentionRule


class LayerBlock:
    """Block ``index`` of a model; ``contract.Block`` is what it is to others.

    layer         with our attention inside, its linear modules packed or not
    angles        shared with the model's other blocks; ``angles_part`` says which of its tensors are this block's
    team          what attends on a CPU, to pages in its order; None: torch
    uses_kernels  whether the CPU's or the GPU's kernels may attend where they can; else torch does, as it computes
                  experts and norms
    rule          what the layer's attention asks of kernels, once it is known. Captured steps read its tensors, so
                  it lives as long as the weights
    """

    def __init__(
        self, index: int, config: ModelConfig, layer: nn.Module, angles: Angles, angles_part: slice
    ) -> None:
        self.index = index
        self.config = config
        self.dtype = angles.dtype
        self.device = angles.device
        self.nbytes = layer_nbytes(layer)
        self.layer = layer
        self.angles = angles
        self.window = config.windows[index]
        self.adapted: Mapping[str, Block | None] = {}
        self.team: _C.LayerTeam | None = None
        self.uses_kernels = True
        self.rule: AttentionRule | None = None
        self.angles_part = angles_part
        self._call = LayerCall(layer)

    @property
    def is_capturable(self) -> bool:
        """Whether the host never waits for what the layer computed."""
        return experts_are_capturable(self.layer)

    def leave_kernels(self) -> None:
        """Have torch compute what is not a product of one matrix."""
        self.uses_kernels = False
        leave_kernels(self.layer)

    def with_updates(self, updates: Mapping[str, LowRankUpdate]) -> LayerBlock:
        """The block with these linear modules adapted, by their names in the layer.

        The weights are shared; ``nbytes`` is what the updates take.
        """
        layer = adapt_layer(self.layer, updates)
        block = LayerBlock(self.index, self.config, layer, self.angles, self.angles_part)
        block.nbytes = sum(update.nbytes for update in updates.values())
        block.team, block.uses_kernels = self.team, self.uses_kernels
        return block

    def forward_paged(
        self, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """As ``contract.Block``."""
        call: AttentionCall = PagedCall(kv, batch, self.index, self.window)
        if self.team is not None and self.uses_kernels and isinstance(kv, HeadMajorKV):
            call = NativeCall(self.team, kv, batch, self.index, self.window)
        return self.compute(hidden, cos_sin, call, batch.positions.long())

    def compute(
        self, hidden: torch.Tensor, cos_sin: CosSin, call: AttentionCall, positions: torch.Tensor
    ) -> torch.Tensor:
        """``hidden`` ``[T, M]`` of tokens at ``positions`` ``[T]`` int64, which attend by ``call``."""
        return self._call(hidden.unsqueeze(0), cos_sin[self.angles_part], call, positions).squeeze(0)

    def forward_dense(self, hidden: torch.Tensor) -> torch.Tensor:
        """As ``contract.Block``."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        cos_sin = self.angles.cos_sin(positions)[self.angles_part]
        return self._call(hidden, cos_sin, DenseCall(self.window), positions)


class LayerCall:
    """Calls a layer with what its family's signature asks for."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        names = inspect.signature(layer.forward).parameters
        self._takes_positions = "position_ids" in names
        self._takes_angles = "position_embeddings" in names
        self._takes_alibi = "alibi" in names
        self._past_name = "layer_past" if self._takes_alibi else None

    def __call__(
        self, hidden: torch.Tensor, cos_sin: CosSin, call: AttentionCall, positions: torch.Tensor
    ) -> torch.Tensor:
        """hidden ``[B, n, M]``, positions ``[n]``; returns ``[B, n, M]``."""
        arguments: dict[str, Any] = {"attention_mask": None, CALL_KEYWORD: call}
        if self._takes_positions:
            arguments["position_ids"] = positions.unsqueeze(0)
        if self._takes_angles:
            arguments["position_embeddings"] = tuple(part.unsqueeze(0) for part in cos_sin) or None
        if self._past_name is not None:  # the only argument that these layers hand on to their attention
            arguments.update({self._past_name: call, "alibi": None})
        return first_tensor(self._layer(hidden, **arguments))


def first_tensor(result: Any) -> torch.Tensor:
    """The hidden states, which some layers return with attention weights beside them."""
    states: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return states
