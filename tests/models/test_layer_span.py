"""Layers of transformers with attention by kernels, in Triton's interpreter, give what they give by torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.config import Quantization
from petalsd.models import ladder as ladders
from petalsd.models.architecture import Architecture
from petalsd.models.gpu_products import GpuProducts
from petalsd.models.hf import layer_span
from petalsd.models.hf.block import LayerBlock
from petalsd.models.hf.layer_span import LayerSpan
from petalsd.models.hf.norms import replace_norms
from petalsd.models.hf.stand_ins import leave_kernels
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.paged_span import BlockByBlock, PagedSpan
from petalsd.models.source import ModelSource
from petalsd.models.spans import can_attend_by_kernels, paged_span
from petalsd.models.weight_storage import WeightStorage
from petalsd.types import BlockSpan
from tests.models.kernel_blocks import NUM_SMS
from tests.numeric import assert_close
from tests.paged_rows import PagedRows
from tests.tiers import nightly_except
from tests.tiny_models import LAYER_VARIANTS, make_tiny

CPU = torch.device("cpu")
STEPS = [{0: 18, 1: 2}, {0: 1, 1: 1}, {1: 2, 0: 1}]
"""New tokens by row: prefill, decode, and a decode after a prefill."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **LAYER_VARIANTS,
    "falcon-one-head": ("falcon", {"num_attention_heads": 18, "hidden_size": 18 * 16}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma-24": LAYER_VARIANTS["gemma"],
    "qwen3": ("qwen3", {"head_dim": 32}),
    "llama-longrope": ("llama", {"rope": "longrope"}),
}
INTERPRETED = [
    "bloom-6-heads", "deepseek_v3", "falcon", "falcon-alibi", "falcon-new", "falcon-one-head", "gemma2",
    "gemma3_text", "glm4", "gpt_oss", "llama-longrope", "ministral3", "mixtral", "phi3-longrope", "qwen2_moe",
    "smollm3",
]  # fmt: skip
"""Those that differ where attention or experts are computed; to interpret all would take long."""
DAILY = ("bloom-6-heads", "deepseek_v3", "gemma2", "gpt_oss", "phi3-longrope", "qwen2_moe")
KERNEL_VARIANTS = [variant for variant in VARIANTS if variant != "gemma-24"]


class Case:
    """Blocks of a tiny model as layers of transformers: the first one, or two of different kinds."""

    def __init__(self, path: Path, variant: str, quantization: Quantization = "none") -> None:
        family, overrides = VARIANTS[variant]
        make_tiny(family, path, **overrides)
        source = ModelSource(str(path))
        storage = WeightStorage.choose(torch.float32, CPU, quantization)
        self.ladder = Ladder(Architecture.read(source.config()), source, storage, 1)
        self.config = self.ladder.architecture.config
        kinds = {self.ladder.architecture.kind(index) for index in range(2)}
        self.span = BlockSpan(0, len(kinds))

    def blocks(self, rung: Rung = Rung.PLAIN) -> dict[int, LayerBlock]:
        """New ones, on a rung."""
        built = {index: self.ladder.build(rung, index) for index in self.span}
        return {index: block for index, block in built.items() if isinstance(block, LayerBlock)}

    def kernel_blocks(self) -> dict[int, LayerBlock]:
        """As a GPU has them: experts and norms are computed by kernels, too."""
        blocks, names = self.blocks(), self.ladder.architecture.layers.family.experts
        products = GpuProducts(CPU, NUM_SMS)
        for block in blocks.values():
            leave_kernels(block.layer)  # of a CPU
            if names is not None:
                products.replace_experts(block.layer, names)
            replace_norms(block.layer, products.norm)
        return blocks

    def through(self, span: PagedSpan, *, with_angles: bool = True) -> torch.Tensor:
        """The states after the blocks of all tokens of all steps."""
        rows = PagedRows(len(self.span), self.config.num_kv_heads, self.config.head_dim, page_tokens=16)
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            rows.add_row()
        answers = []
        for new in STEPS:
            batch = rows.extend(new)
            hidden = torch.randn(batch.num_tokens, self.config.hidden_size, generator=generator)
            counts = torch.tensor(batch.token_bounds).diff()
            seq_lens = torch.tensor(batch.context_lens).repeat_interleave(counts)
            with torch.inference_mode():
                angles = self.ladder.angles.cos_sin(batch.positions, seq_lens) if with_angles else ()
                answers.append(span.forward_paged(self.span, hidden, rows.kv, batch, angles))
        return torch.cat(answers)


@pytest.mark.parametrize("variant", nightly_except(INTERPRETED, *DAILY))
def test_a_batch_of_any_rows_equals_the_layers(variant: str, tmp_path: Path) -> None:
    """With windows, capped scores, linear biases, shared heads, experts, and angles that the span finds itself."""
    case = Case(tmp_path, variant)
    blocks = case.kernel_blocks()
    span, is_static = LayerSpan(blocks, NUM_SMS), not case.ladder.angles.is_length_dependent
    expected = case.through(BlockByBlock(case.blocks()))
    assert_close(case.through(span, with_angles=not is_static), expected, 1e-4, 1e-4, variant)
    assert all(block.rule is not None for block in blocks.values())


def test_packed_layers_are_computed_from_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kernels both, as products with the rounded weights by torch."""
    case = Case(tmp_path, "phi", "int8")
    exact = Case(tmp_path, "phi").blocks()
    for block in exact.values():
        ladders.round_layer(block.layer, None, case.ladder.storage.format)  # type: ignore[arg-type]
    monkeypatch.setattr(Ladder, "_products", GpuProducts(CPU, NUM_SMS))
    actual = case.through(LayerSpan(case.blocks(Rung.PACKED), NUM_SMS))
    assert_close(actual, case.through(BlockByBlock(exact)), 1e-4, 1e-4, "int8")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Layers believe that they are on one; what becomes spans of layers is noted."""
    made: list[list[int]] = []

    def make(blocks: dict[int, LayerBlock]) -> BlockByBlock:
        made.append(sorted(blocks))
        return BlockByBlock(blocks)

    monkeypatch.setattr(layer_span, "LayerSpan", make)
    return made


def test_layers_on_a_gpu_attend_by_kernels_where_these_can(tmp_path: Path, on_gpu: list[list[int]]) -> None:
    """Not those whose heads are no multiple of 16, those that were told not to, nor any on a CPU."""
    case, narrow = Case(tmp_path / "phi", "phi"), Case(tmp_path / "gemma", "gemma-24").blocks()[0]
    first, second, third = (case.blocks()[0] for _ in range(3))
    assert not can_attend_by_kernels(first)
    for block in (first, second, third, narrow):
        block.device = torch.device("cuda")
    third.uses_kernels = False
    paged_span({0: first, 1: second, 2: third, 3: narrow}, num_threads=1)
    assert on_gpu == [[0, 1]]
