"""A decode step through random blocks of a model's shape: as kernels are launched, and as graphs are replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.gpu.cards import Shape
from benchmarks.gpu.case import ERROR, Site, relative_error
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.pages import Rows
from benchmarks.gpu.verdict import LAUNCHES, SPAN_STEP, STEP
from benchmarks.report import OURS, Row, Setting
from benchmarks.timing import Work, summarize
from petalsd.models.block import TransformerBlock
from petalsd.models.block_config import BlockConfig
from petalsd.models.rope import Rope
from petalsd.models.weight_storage import WeightStorage
from petalsd.models.weights import assemble_block, block_tensors
from petalsd.ops.ragged import PagedKV
from petalsd.types import BlockSpan

_PATTERN_VALUES = 1 << 22
_DRAWN_BLOCKS = 2


class Graph(Protocol):
    def replay(self) -> None: ...


Capture = Callable[[Work], Graph]


@dataclass(frozen=True, slots=True)
class Model:
    """Random blocks of ``shape``, quantized as ``weights`` says, and how many of them make a step."""

    shape: Shape
    weights: str
    blocks: dict[int, TransformerBlock]

    @classmethod
    def draw(cls, site: Site, shape: Shape, weights: str, num_blocks: int) -> Model:
        """Every other block has the same weights: none finds its own in the cache, and drawing takes long."""
        quantization = "none" if weights == "bfloat16" else weights
        storage = WeightStorage.choose(site.dtype, site.device, quantization)
        config = config_of(shape, num_blocks)
        rope = Rope(config, site.dtype, site.device)
        drawn = []
        for index in range(min(num_blocks, _DRAWN_BLOCKS)):
            shapes = block_tensors(config, index)
            drawn.append(assemble_block(lambda name: _random_weight(shapes[name]), config, index, storage))  # noqa: B023
        blocks = {
            index: TransformerBlock(index, config, drawn[index % len(drawn)], rope)
            for index in range(num_blocks)
        }
        return cls(shape, weights, blocks)

    def first(self, num_blocks: int) -> Model:
        """The same of fewer blocks."""
        return Model(self.shape, self.weights, {index: self.blocks[index] for index in range(num_blocks)})


class DecodeStep:
    """One new token of each of ``num_rows`` rows at ``context``, through all blocks, in static memory.

    span  ``kernel_span.KernelSpan`` over the model's blocks
    rows  what that takes for rows of one token
    """

    def __init__(self, span: Any, rows: Any, kv: PagedKV, hidden: torch.Tensor, context: int) -> None:
        self._span = span
        self._rows = rows
        self._kv = kv
        self._hidden = hidden
        self._states = span.make_states(len(hidden))
        self._plan = span.plan_decode(len(hidden), kv, context)

    def enter(self) -> None:
        self._states.enter(self._hidden)

    def compute(self, blocks: BlockSpan) -> None:
        self._span.compute(blocks, self._states, self._rows, self._kv, self._plan)

    def compute_all(self) -> None:
        self.compute(self._span.span)

    def result(self) -> torch.Tensor:
        """``[rows, M]``, a copy."""
        return self._states.leave(len(self._hidden))

    def parity(self, capture: Capture) -> float:
        """How far replays are from launches, of the whole span and of its blocks one by one: 0 unless wrong."""
        self.enter()
        self.compute_all()
        launched = self.result()
        graphs = [
            [capture(self.compute_all)],
            [
                capture(lambda block=block: self.compute(BlockSpan(block, block + 1)))
                for block in self._span.span
            ],
        ]
        errors = []
        for chain in graphs:
            self.enter()
            for graph in chain:
                graph.replay()
            errors.append(relative_error(self.result(), launched))
        return max(errors)


def make_step(site: Site, model: Model, num_rows: int, context: int) -> DecodeStep:
    """The step by the kernels that serve."""
    from petalsd.models.kernel_span import KernelSpan
    from petalsd.ops.decode_batch import KernelRows, Places

    shape, num_blocks = model.shape, len(model.blocks)
    paged = Rows.draw(site, shape, [context] * num_rows, num_blocks)
    batch = paged.decode()
    rows = KernelRows(Places(batch.positions, batch.write_origins, batch.write_offsets), batch, None)
    span = KernelSpan(model.blocks, site.num_sms)
    return DecodeStep(span, rows, paged.kv, site.randn(num_rows, shape.hidden), context)


def measure(step: DecodeStep, setting: Setting, clock: Clock, samples: int) -> Iterator[Row]:
    """Launches of a step of one block, and its time launched one by one and replayed."""
    step.enter()  # once: what leaves a block is what enters it the next time
    yield Row(OURS, setting, LAUNCHES, "launches", summarize([clock.num_kernels(step.compute_all)]))
    for mode, is_replayed in (("launched", False), ("replayed", True)):
        seconds = clock.seconds(step.compute_all, samples, is_replayed=is_replayed)
        yield Row(OURS, {**setting, "mode": mode}, STEP, "us", summarize([1e6 * each for each in seconds]))


def measure_span(step: DecodeStep, setting: Setting, clock: Clock, samples: int) -> Row:
    """The time of a step through all blocks, replayed as one graph."""
    step.enter()
    seconds = clock.seconds(step.compute_all, samples)
    return Row(
        OURS, {**setting, "mode": "replayed"}, SPAN_STEP, "us", summarize([1e6 * each for each in seconds])
    )


def check_parity(step: DecodeStep, setting: Setting, capture: Capture) -> Row:
    """Replays must give the same bits."""
    return Row(OURS, {**setting, "tolerance": "0"}, ERROR, "x", summarize([step.parity(capture)]))


def config_of(shape: Shape, num_blocks: int) -> BlockConfig:
    """A Llama's."""
    return BlockConfig(
        model_type="llama", num_blocks=num_blocks, hidden_size=shape.hidden, num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, intermediate_size=shape.inner, norm_eps=1e-5,
        activation="silu", qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False,
        windows=(None,) * num_blocks, rope={"rope_type": "default", "rope_theta": 500000.0}, vocab_size=128256,
        max_positions=131072, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip


def _random_weight(shape: tuple[int, ...]) -> torch.Tensor:
    """As weights are after training: products keep the size of what enters. A drawn pattern, repeated."""
    if len(shape) == 1:
        return torch.ones(shape)
    flat = torch.empty(math.prod(shape), dtype=torch.bfloat16)
    pattern = (torch.randn(min(len(flat), _PATTERN_VALUES)) / math.sqrt(shape[-1])).bfloat16()
    for part in flat.split(len(pattern)):
        part.copy_(pattern[: len(part)])
    return flat.view(shape)
