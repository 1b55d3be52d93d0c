"""One transformer block: pre-norm attention and gated MLP, with projections fused at load time.

It computes the same function as the decoder layers of transformers' Llama, Mistral, Qwen2 and Qwen3 models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch.nn import functional

from petalsd import _C
from petalsd.models.block_config import BlockConfig
from petalsd.models.contract import Block
from petalsd.models.paged_span import CosSin
from petalsd.models.rope import Rope
from petalsd.ops.attention import dense_attention, paged_attention
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.kv import write_kv
from petalsd.ops.linear import Weight, linear
from petalsd.ops.low_rank import LowRankWeight
from petalsd.ops.native_attention import native_attention
from petalsd.ops.norm import rms_norm
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.ops.rotary import apply_rope

KeysValues: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """All on one device, none requires grad; I is the intermediate size.

    Tensors are of the block's dtype, as norms and biases always are. The projections may be packed, and
    then of a lower precision than what is computed with them, or those of another block with an adapter's
    terms beside them.

    qkv      ``[(H + 2*Hkv) * D, M]`` q, k and v one below the other
    gate_up  ``[2*I, M]`` gate above up
    """

    input_norm: torch.Tensor
    qkv: Weight
    output: Weight
    mlp_norm: torch.Tensor
    gate_up: Weight
    down: Weight
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors, or of an adapter's terms alone, beside which the tensors are another block's."""
        tensors = [tensor for field in fields(self) if (tensor := getattr(self, field.name)) is not None]
        terms = [tensor for tensor in tensors if isinstance(tensor, LowRankWeight)]
        return sum(tensor.nbytes for tensor in terms or tensors)

    @property
    def is_adapted(self) -> bool:
        """Whether there are low-rank terms beside any projection; only ``ops.linear`` computes them."""
        matrices = (self.qkv, self.output, self.gate_up, self.down)
        return any(isinstance(matrix, LowRankWeight) for matrix in matrices)


class TransformerBlock:
    """Block ``index`` of a model. ``rope`` is shared with the model's other blocks.

    team  what attends on a CPU, to pages in its order, where the block is not computed as a whole; None: torch
    """

    def __init__(self, index: int, config: BlockConfig, weights: BlockWeights, rope: Rope) -> None:
        self.index = index
        self.config = config
        self.weights = weights
        self.rope = rope
        self.adapted: Mapping[str, Block | None] = {}
        self.team: _C.LayerTeam | None = None
        self.window = config.windows[index]
        self._scale = config.head_dim**-0.5
        self._activation = _ACTIVATIONS[config.activation]

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.input_norm.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.input_norm.device

    def forward_paged(
        self,
        hidden: torch.Tensor,
        kv: PagedKV,
        batch: RaggedBatch,
        cos_sin: CosSin,
    ) -> torch.Tensor:
        """Write the new tokens' K and V into the pages and attend over them. Call it under inference mode.

        hidden   ``[T, M]`` in the block's dtype
        cos_sin  of ``batch.positions``, from ``Rope.cos_sin``; the same for all blocks

        Returns ``[T, M]``, a new tensor.
        """
        q, k, v = self._project_qkv(hidden, cos_sin)
        if self.team is not None and isinstance(kv, HeadMajorKV):
            place = self.index, self.window
            attended = native_attention(self.team, (q, k, v), kv, batch, place, self._scale)
        else:
            write_kv(k, v, kv, batch, self.index)
            attended = paged_attention(q, kv, batch, self.index, self._scale, self.window)
        return self._complete(hidden, attended.flatten(-2))

    def forward_dense(self, hidden: torch.Tensor) -> torch.Tensor:
        """Whole sequences from position 0 without a cache, differentiable with respect to ``hidden``.

        hidden ``[B, n, M]`` in the block's dtype; returns ``[B, n, M]``.
        """
        return self.forward_part(hidden, self.dense_cos_sin(hidden.shape[1]))[0]

    def dense_cos_sin(self, num_tokens: int) -> CosSin:
        """Of whole sequences of so many tokens from position 0: two ``[n, D]``."""
        return self.rope.cos_sin(torch.arange(num_tokens, device=self.device))

    def forward_part(
        self, hidden: torch.Tensor, cos_sin: CosSin, past: KeysValues | None = None
    ) -> tuple[torch.Tensor, KeysValues]:
        """``forward_dense`` of a part of whole sequences, differentiable with respect to ``hidden`` and ``past``.

        hidden   ``[B, n, M]``, what follows the ``c`` tokens of the parts before
        cos_sin  of these n tokens
        past     keys and values of the parts before, each ``[B, Hkv, c, D]``; None: there are none

        Returns ``[B, n, M]``, and keys and values of all ``c + n`` tokens.
        """
        q, keys, values = self.project_part(hidden, cos_sin, past)
        attended = dense_attention(q, keys, values, self._scale, self.window)
        return self._complete(hidden, attended.transpose(1, 2).flatten(-2)), (keys, values)

    def project_part(
        self, hidden: torch.Tensor, cos_sin: CosSin, past: KeysValues | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The projections of ``forward_part``: q ``[B, H, n, D]``, and k and v of all tokens so far."""
        q, k, v = (t.transpose(1, 2) for t in self._project_qkv(hidden, cos_sin))
        if past is None:
            return q, k, v
        return q, torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)

    def _project_qkv(
        self, hidden: torch.Tensor, cos_sin: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[..., T, M]`` to q ``[..., T, H, D]`` and k, v ``[..., T, Hkv, D]``; q and k normed and rotated."""
        config, weights = self.config, self.weights
        num_qk_heads = config.num_heads + config.num_kv_heads
        normed = rms_norm(hidden, weights.input_norm, config.norm_eps)
        qkv = linear(normed, weights.qkv, weights.qkv_bias)
        # Heads must be contiguous, or attention takes its slow path.
        qkv = qkv.contiguous().view(*hidden.shape[:-1], -1, config.head_dim)
        qk, v = qkv[..., :num_qk_heads, :], qkv[..., num_qk_heads:, :]
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = qk[..., : config.num_heads, :], qk[..., config.num_heads :, :]
            q = rms_norm(q, weights.q_norm, config.norm_eps)
            k = rms_norm(k, weights.k_norm, config.norm_eps)
            qk = torch.cat((q, k), dim=-2)
        qk = apply_rope(qk, *cos_sin)
        return qk[..., : config.num_heads, :], qk[..., config.num_heads :, :], v

    def _complete(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, residual, MLP, residual. hidden ``[..., M]``, attended ``[..., H*D]``."""
        weights = self.weights
        hidden = hidden + linear(attended, weights.output, weights.output_bias)
        normed = rms_norm(hidden, weights.mlp_norm, self.config.norm_eps)
        gate, up = linear(normed, weights.gate_up, weights.gate_up_bias).chunk(2, dim=-1)
        return hidden + linear(self._activation(gate) * up, weights.down, weights.down_bias)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
}
