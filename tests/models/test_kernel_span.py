"""Blocks by fused kernels, in Triton's interpreter, give what the same blocks give by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.config import Quantization
from petalsd.models import kernel_span
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.block import TransformerBlock
from petalsd.models.paged_span import BlockByBlock, PagedSpan
from petalsd.models.source import ModelSource
from petalsd.models.spans import can_be_fused, paged_span
from petalsd.models.weights import load_block
from petalsd.ops.packed_weight import PackedWeight
from petalsd.ops.quantized_product import QuantizedProduct
from petalsd.ops.split_workspace import SplitWorkspace
from petalsd.types import BlockSpan
from tests.adapter_files import draw_adapter, write_adapter
from tests.models.kernel_blocks import NUM_SMS, unpacked
from tests.models.kernel_blocks import kernel_span as make_kernel_span
from tests.models.test_block import CPU, VARIANTS, Case
from tests.numeric import assert_close
from tests.paged_rows import PagedRows

SPAN = BlockSpan(0, 2)
STEPS = [{0: 18, 1: 2}, {0: 1, 1: 1}, {0: 1, 1: 3}, {1: 2, 0: 1}]
"""New tokens by row: prefill, decode, decode before prefill and after it."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "longrope": VARIANTS["llama-longrope"],
    "windows": ("qwen2", {"max_window_layers": 1}),
}


def through(case: Case, span: PagedSpan, steps: list[dict[int, int]]) -> torch.Tensor:
    """The states after ``SPAN`` of all tokens of all steps."""
    rows = PagedRows(len(SPAN), case.config.num_kv_heads, case.config.head_dim, page_tokens=16)
    for _ in range(2):
        rows.add_row()
    answers = []
    for new in steps:
        starts = {row: rows.lengths[row] for row in new}
        batch = rows.extend(new)
        hidden = torch.cat([case.inputs[0, starts[row] : starts[row] + count] for row, count in new.items()])
        counts = torch.tensor(batch.token_bounds).diff()
        seq_lens = torch.tensor(batch.context_lens).repeat_interleave(counts)
        with torch.inference_mode():
            cos_sin = case.rope.cos_sin(batch.positions, seq_lens)
            answers.append(span.forward_paged(SPAN, hidden, rows.kv, batch, cos_sin))
    return torch.cat(answers)


def plain(blocks: list[TransformerBlock]) -> BlockByBlock:
    return BlockByBlock({block.index: block for block in blocks})


def make_case(path: Path, family: str = "llama", **overrides: Any) -> Case:
    return Case(path, family, {"num_hidden_layers": 2, **overrides})


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_of_any_rows_equals_the_blocks(model: str, tmp_path: Path) -> None:
    """In every order of decode and prefill rows, with biases, windows, and angles by the length of a row."""
    family, overrides = MODELS[model]
    case = make_case(tmp_path, family, **overrides)
    blocks = case.blocks[: len(SPAN)]
    actual = through(case, make_kernel_span(blocks), STEPS)
    assert_close(actual, through(case, plain(blocks), STEPS), 1e-5, 1e-5, model)


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_quantized_blocks_are_computed_from_their_packed_weights(how: str, tmp_path: Path) -> None:
    """As by products with the unpacked weights."""
    case = make_case(tmp_path)
    source = ModelSource(str(tmp_path))
    blocks = [
        load_block(source, case.config, index, torch.float32, CPU, rope=case.rope, quantization=how)
        for index in SPAN
    ]
    assert isinstance(blocks[0].weights.qkv, PackedWeight)
    span = kernel_span.KernelSpan({block.index: block for block in blocks}, NUM_SMS)
    actual = through(case, span, STEPS[2:3])
    assert_close(actual, through(case, plain(blocks), STEPS[2:3]), 1e-4, 1e-4, how)


@pytest.mark.parametrize("how", ["none", "int8"])
def test_an_adapted_block_adds_its_terms(how: Quantization, tmp_path: Path) -> None:
    """Beside plain and packed weights, in every order of rows, as by torch."""
    case = make_case(tmp_path / "model", attention_bias=True)
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    tensors = draw_adapter(
        case.reference, [f"model.layers.{block}.{name}" for block in SPAN for name in modules]
    )
    source = ModelSource(str(write_adapter(tmp_path / "adapter", tensors)))
    adapter = Adapter.open(source, Architecture.read(ModelSource(str(tmp_path / "model")).config()))
    workspace = SplitWorkspace.allocate(CPU, NUM_SMS)

    def adapted(block: TransformerBlock) -> TransformerBlock:
        found = adapter.adapt(block, lambda weight: QuantizedProduct(weight, workspace))
        assert isinstance(found, TransformerBlock) and found.weights.is_adapted
        return found

    made = [
        load_block(
            ModelSource(str(tmp_path / "model")),
            case.config,
            index,
            torch.float32,
            CPU,
            rope=case.rope,
            quantization=how,
        )
        for index in SPAN
    ]
    blocks = [adapted(block if how == "int8" else unpacked(block)) for block in made]
    span = kernel_span.KernelSpan({block.index: block for block in blocks}, NUM_SMS)
    actual, expected = through(case, span, STEPS[1:]), through(case, plain(blocks), STEPS[1:])
    assert_close(actual, expected, 1e-4, 1e-4, how)
    assert (expected - through(case, plain(made), STEPS[1:])).abs().max() > 0.1


def test_blocks_on_a_gpu_get_kernels_where_these_can_compute_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others, here with heads of 24, are computed one by one; so are all on the CPU, but for the C++ code."""
    case, odd = make_case(tmp_path / "even"), make_case(tmp_path / "odd", "qwen3")
    made: list[list[int]] = []

    def make(blocks: dict[int, TransformerBlock]) -> BlockByBlock:
        made.append(sorted(blocks))
        return BlockByBlock(blocks)

    monkeypatch.setattr(TransformerBlock, "device", torch.device("cuda"))
    monkeypatch.setattr(kernel_span, "KernelSpan", make)
    paged_span({0: case.blocks[0], 1: odd.blocks[1]}, num_threads=1)
    assert made == [[0]]
    monkeypatch.undo()
    assert not can_be_fused(case.blocks[0])


def test_a_plan_serves_all_blocks_of_the_model(tmp_path: Path) -> None:
    """Captured steps work by the plan of whichever span was first, also those of blocks that came later."""
    case = make_case(tmp_path, *MODELS["windows"][:1], **MODELS["windows"][1])
    span = make_kernel_span(case.blocks[:1])
    pages = PagedRows(len(SPAN), case.config.num_kv_heads, case.config.head_dim, page_tokens=16)
    assert span.plan_decode(2, pages.kv, 64).decode.keys() == set(case.config.windows)
    assert len(set(case.config.windows)) == 2
