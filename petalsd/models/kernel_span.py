"""Steps of consecutive blocks on a GPU by fused kernels: at most ten launches for each block in decode, and some
more for the terms of an adapter.

Nothing here reads from the device, and all memory is the caller's, so that whatever is computed can be captured as
a graph and replayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from petalsd.models.block import TransformerBlock
from petalsd.models.block_config import BlockConfig
from petalsd.models.paged_span import CosSin
from petalsd.ops.add_norm import add_norm
from petalsd.ops.attention_rule import AttentionRule
from petalsd.ops.decode_attention import DecodePlan, plans_by_window
from petalsd.ops.decode_batch import KernelRows, kernel_rows
from petalsd.ops.dense_linear import dense_linear
from petalsd.ops.gated_activation import gated_activation
from petalsd.ops.linear import Weight
from petalsd.ops.low_rank import LowRankWeight
from petalsd.ops.norm import Norm
from petalsd.ops.packed_weight import PackedWeight
from petalsd.ops.quantized_linear import quantized_linear
from petalsd.ops.ragged import PagedKV, RaggedBatch
from petalsd.ops.rope_kv import HeadNorms, Rotation, rope_and_write
from petalsd.ops.row_attention import attend_rows
from petalsd.ops.split_workspace import SplitWorkspace
from petalsd.types import BlockSpan

_FIRST_POSITIONS = 1024  # of the table of angles, which grows


@dataclass(slots=True)
class StepStates:
    """What T tokens leave between the launches of a block. Every block uses the same memory.

    residual, delta  ``[T, M]``: their sum is what enters a block, and what leaves it
    normed           ``[T, M]``
    qkv              ``[T, (H + 2*Hkv) * D]``
    q, attended      ``[T, H, D]``
    gate_up          ``[T, 2*I]``
    activated        ``[T, I]``
    """

    residual: torch.Tensor
    delta: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    attended: torch.Tensor
    gate_up: torch.Tensor
    activated: torch.Tensor

    @classmethod
    def empty(cls, tokens: int, config: BlockConfig, dtype: torch.dtype, device: torch.device) -> StepStates:
        hidden, heads = (config.hidden_size,), (config.num_heads, config.head_dim)
        fused = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        inner = config.intermediate_size
        shapes = (hidden, hidden, hidden, (fused,), heads, heads, (2 * inner,), (inner,))
        return cls(*(torch.empty(tokens, *shape, dtype=dtype, device=device) for shape in shapes))

    def first(self, tokens: int) -> StepStates:
        """Those of the first tokens, views."""
        return StepStates(*(getattr(self, field.name)[:tokens] for field in fields(self)))

    def clear(self) -> None:
        """Zeros everywhere."""
        for field in fields(self):
            getattr(self, field.name).zero_()

    def enter(self, hidden: torch.Tensor) -> None:
        """``hidden`` ``[n, M]`` of the first n tokens is what enters the next block."""
        self.residual[: len(hidden)].copy_(hidden)
        self.delta[: len(hidden)].zero_()

    def leave(self, tokens: int) -> torch.Tensor:
        """What left the last block for the first tokens: ``[tokens, M]``, a new tensor."""
        return self.residual[:tokens] + self.delta[:tokens]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step needs beside its rows, and other steps of its size too; the tensors never move.

    decode     by the window of a block; empty where no row has a single token
    workspace  of products
    """

    rotation: Rotation
    decode: Mapping[int | None, DecodePlan]
    workspace: SplitWorkspace


class KernelSpan:
    """``PagedSpan`` of consecutive blocks that ``spans.can_be_fused`` permits. One call at a time.

    num_sms  multiprocessors of the device; None: asks it
    """

    def __init__(self, blocks: Mapping[int, TransformerBlock], num_sms: int | None = None) -> None:
        first = next(iter(blocks.values()))
        self.span = BlockSpan(min(blocks), max(blocks) + 1)
        self.config, self.dtype, self.device = first.config, first.dtype, first.device
        self._num_sms = num_sms or torch.cuda.get_device_properties(self.device).multi_processor_count
        self._workspace = SplitWorkspace.allocate(self.device, self._num_sms)
        self._sources = blocks
        self._blocks = {index: KernelBlock(block) for index, block in blocks.items()}
        # Of all the model's blocks, so that what is planned here serves other blocks of it too.
        self._windows = set(first.config.windows)
        self._rope = first.rope
        self._angles = torch.empty(0)

    @property
    def is_capturable(self) -> bool:
        """Not where a token's angles depend on the length of its row, so that ``cos_sin`` is needed."""
        return not self._rope.is_length_dependent

    def forward_paged(
        self, blocks: BlockSpan, hidden: torch.Tensor, kv: PagedKV, batch: RaggedBatch, cos_sin: CosSin
    ) -> torch.Tensor:
        """As ``PagedSpan``. Rows of one token cost least where they come first.

        ``cos_sin`` may be empty where steps are capturable.
        """
        rows, states = kernel_rows(batch), self.make_states(len(hidden))
        rotation = self._rotation(batch.longest) if self.is_capturable else self._rotation_of(cos_sin)
        states.enter(hidden)
        plan = StepPlan(rotation, self._decode_plans(rows.num_decodes, kv), self._workspace)
        self.compute(blocks, states, rows, kv, plan)
        return states.leave(len(hidden))

    def make_states(self, tokens: int) -> StepStates:
        return StepStates.empty(tokens, self.config, self.dtype, self.device)

    def plan_decode(self, num_rows: int, kv: PagedKV, end: int) -> StepPlan:
        """For steps of ``num_rows`` rows of one token, padding included, at positions below ``end``.

        Through any blocks of the model. Not where angles depend on the length of a row.
        """
        return StepPlan(self._rotation(end), self._decode_plans(num_rows, kv), self._workspace)

    def source(self, block: int) -> TransformerBlock:
        """What is computed; captured steps have the addresses of its weights."""
        return self._sources[block]

    def compute(
        self, blocks: BlockSpan, states: StepStates, rows: KernelRows, kv: PagedKV, plan: StepPlan
    ) -> None:
        """The states through ``blocks``, in place; keys and values of the new tokens into their pages."""
        for index in blocks:
            self._blocks[index].compute(states, rows, kv, plan)

    def _decode_plans(self, num_rows: int, kv: PagedKV) -> Mapping[int | None, DecodePlan]:
        config = self.config
        return plans_by_window(
            self._windows, num_rows, config.num_heads, kv, self._num_sms, config.max_positions
        )

    def _rotation(self, end: int) -> Rotation:
        """For positions below ``end``."""
        if len(self._angles) < end:
            self._angles = self._rope.table(max(end, _FIRST_POSITIONS, 2 * len(self._angles)))
        return Rotation(self._angles)

    def _rotation_of(self, cos_sin: CosSin) -> Rotation:
        """Of tokens whose angles these are, ``[T, D]`` each with both halves the same."""
        half = self.config.head_dim // 2
        angles = torch.stack([part[:, :half].float() for part in cos_sin], dim=1)
        return Rotation(angles, torch.arange(len(angles), dtype=torch.int32, device=self.device))


class KernelBlock:
    """One block as a sequence of launches."""

    def __init__(self, block: TransformerBlock) -> None:
        config, weights = block.config, block.weights
        self.index = block.index
        self._window = block.window
        self._rule = AttentionRule(config.head_dim**-0.5, block.window)
        self._activation = config.activation
        self._input_norm = Norm(weights.input_norm, config.norm_eps)
        self._mlp_norm = Norm(weights.mlp_norm, config.norm_eps)
        self._head_norms = (
            None
            if weights.q_norm is None or weights.k_norm is None
            else HeadNorms(weights.q_norm, weights.k_norm, config.norm_eps)
        )
        self._qkv = Projection(weights.qkv, weights.qkv_bias)
        self._output = Projection(weights.output, weights.output_bias)
        self._gate_up = Projection(weights.gate_up, weights.gate_up_bias)
        self._down = Projection(weights.down, weights.down_bias)

    def compute(self, states: StepStates, rows: KernelRows, kv: PagedKV, plan: StepPlan) -> None:
        """As ``KernelSpan.compute``."""
        add_norm(states.delta, states.residual, self._input_norm, states.normed)
        self._qkv.multiply(states.normed, states.qkv, plan.workspace)
        rope_and_write(states.qkv, states.q, kv, rows.places, self.index, plan.rotation, self._head_norms)
        decode = plan.decode.get(self._window)
        attend_rows(states.q, kv, rows, self.index, self._rule, decode, states.attended)
        self._output.multiply(states.attended.flatten(1), states.delta, plan.workspace)
        add_norm(states.delta, states.residual, self._mlp_norm, states.normed)
        self._gate_up.multiply(states.normed, states.gate_up, plan.workspace)
        gated_activation(states.gate_up, states.activated, self._activation)
        self._down.multiply(states.activated, states.delta, plan.workspace)


class Projection:
    """The product with one weight, and its bias: in one launch, unless an adapter adds to it."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def multiply(self, x: torch.Tensor, out: torch.Tensor, workspace: SplitWorkspace) -> None:
        """``out = x @ weight.T + bias``; x ``[T, in]``, out ``[T, out]``."""
        if isinstance(self._weight, LowRankWeight):
            out.copy_(self._weight.multiply(x, self._bias))
        elif isinstance(self._weight, PackedWeight):
            quantized_linear(x, self._weight, self._bias, out, workspace)
        else:
            dense_linear(x, self._weight, self._bias, out, workspace)
