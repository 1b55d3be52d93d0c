"""Blocks with an adapter compute what the model does that it was merged into; the others stay as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from petalsd import _C
from petalsd.config import Quantization
from petalsd.errors import WeightsError
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.block import TransformerBlock
from petalsd.models.contract import Block
from petalsd.models.hf.block import LayerBlock
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.native_span import NativeSpan
from petalsd.models.paged_span import BlockByBlock
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.spans import paged_span
from petalsd.models.weight_storage import WeightStorage
from petalsd.models.weights import assemble_block, block_tensors, read_tensors
from petalsd.ops.packed_product import PackedProduct, Product
from petalsd.ops.packed_weight import PackedWeight
from tests.adapter_files import draw_adapter, merge, write_adapter
from tests.numeric import assert_close
from tests.paged_rows import PagedRows
from tests.tiny_models import LAYER_VARIANTS, make_tiny

CPU = torch.device("cpu")
INDEX = 1
UNPACKED = "unpacked"
LEFT_OUT = {"qwen3": ("q_proj", "gate_proj"), "qwen2": ("k_proj", "down_proj")}
CASES = [
    ("llama-biased", Rung.FUSED), ("qwen3", Rung.FUSED), ("qwen2", UNPACKED),
    ("llama-biased", Rung.PACKED), ("bloom", Rung.PACKED), ("phi3", Rung.PACKED), ("qwen2_moe", Rung.PACKED),
    ("falcon-new", Rung.PLAIN), ("opt", Rung.PLAIN), ("gpt_neox", Rung.PLAIN), ("qwen3_moe", Rung.PLAIN),
]  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **LAYER_VARIANTS,
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    **{family: (family, {}) for family in ("llama", "qwen2", "qwen3")},
}


def make_product(weight: PackedWeight) -> Product:
    return PackedProduct(weight, _C.LayerTeam(1, "auto"))


class Model:
    """A tiny model in a directory, and block 1 of it."""

    def __init__(self, path: Path, rung: str) -> None:
        self.source = ModelSource(str(path))
        self.architecture = Architecture.read(self.source.config())
        self.ladder = Ladder(self.architecture, self.source, WeightStorage.choose(torch.float32, CPU), 1)
        self.block = self._unpacked() if rung == UNPACKED else self.ladder.build(Rung(rung), INDEX)

    def _unpacked(self) -> Block:
        """As on a GPU: the projections are plain tensors."""
        config, rope = self.architecture.fused, self.ladder.angles
        assert config is not None and isinstance(rope, Rope)
        tensors = read_tensors(self.source, block_tensors(config, INDEX))
        weights = assemble_block(tensors.__getitem__, config, INDEX, WeightStorage(torch.float32, CPU, None))
        return TransformerBlock(INDEX, config, weights, rope)

    def hidden(self, *shape: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(1)
        return torch.randn(*shape, self.architecture.config.hidden_size, generator=drawn)


class Case:
    """Base, adapter for about all linear modules of the blocks, and the model with merged weights."""

    def __init__(self, path: Path, variant: str, rung: str) -> None:
        family, overrides = VARIANTS[variant]
        self.rung = rung
        reference = make_tiny(family, path / "base", **overrides)
        tensors = draw_adapter(reference, linear_modules(reference, LEFT_OUT.get(variant, "up_proj")))
        merge(reference, tensors)
        reference.save_pretrained(path / "merged")
        self.base, self.merged = Model(path / "base", rung), Model(path / "merged", rung)
        adapter_source = ModelSource(str(write_adapter(path / "adapter", tensors)))
        self.adapter = Adapter.open(adapter_source, self.base.architecture)
        self.adapted = self.base.ladder.adapt(self.base.block, self.adapter)


def linear_modules(model: PreTrainedModel, left_out: str | tuple[str, ...]) -> list[str]:
    """Of the blocks, but those that end so."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ("layers" in name or ".h." in name)
        and not name.endswith(left_out)
    ]


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model"), *request.param)


def run_steps(
    model: Model, block: Block, counts: list[dict[int, int]], *, is_head_major: bool = True
) -> list[torch.Tensor]:
    """Rows of so many new tokens each, iteration after iteration; over pages as a CPU has them, or others."""
    config = model.architecture.config
    rows = PagedRows(config.num_blocks, config.num_kv_heads, config.head_dim, page_tokens=16)
    if is_head_major:
        rows = rows.in_head_major()
    for _ in range(2):
        rows.add_row()
    outputs = []
    for new in counts:
        batch = rows.extend(new)
        with torch.inference_mode():
            cos_sin = model.ladder.angles.cos_sin(batch.positions, batch.positions + 1)
            outputs.append(block.forward_paged(model.hidden(sum(new.values())), rows.kv, batch, cos_sin))
    return outputs


STEPS = [{0: 9}, {0: 1}, {0: 1, 1: 70}, {0: 1, 1: 1}]


def test_an_adapted_block_equals_merged_weights(case: Case) -> None:
    """Prefills, decodes of one row and of more, and whole sequences; the base's answer is far from it."""
    ours = run_steps(case.base, case.adapted, STEPS)
    theirs = run_steps(case.merged, case.merged.block, STEPS, is_head_major=False)
    for step, (states, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(states, expected, 2e-4, 2e-4, f"step {step}")
    assert isinstance(case.adapted, TransformerBlock | LayerBlock) and case.adapted.team is not None
    hidden = case.base.hidden(2, 11)
    dense, expected = (block.forward_dense(hidden) for block in (case.adapted, case.merged.block))
    assert_close(dense, expected, 2e-4, 2e-4, "whole sequences")
    assert (case.base.block.forward_dense(hidden) - expected).norm() > 0.1 * (expected - hidden).norm()


def test_gradients_of_an_adapted_block_equal_those_of_merged_weights(case: Case) -> None:
    """With respect to the states that come in."""
    gradients = []
    for block in (case.adapted, case.merged.block):
        hidden = case.base.hidden(1, 11).requires_grad_()
        outputs = block.forward_dense(hidden)
        (gradient,) = torch.autograd.grad((outputs * case.base.hidden(1, 11).flip(1)).sum(), hidden)
        gradients.append(gradient)
    assert_close(*gradients, 1e-3, 1e-3, "gradient of the input")


def test_the_base_block_stays_as_it_is(case: Case) -> None:
    """Bit for bit beside an adapted one, which takes what the adapter adds."""
    alone = Model(Path(case.base.source.source), case.rung).block
    hidden = case.base.hidden(1, 11)
    case.adapted.forward_dense(hidden)
    assert torch.equal(case.base.block.forward_dense(hidden), alone.forward_dense(hidden))
    assert type(case.adapted) is type(case.base.block)
    assert case.adapted.nbytes == case.adapter.max_block_nbytes(torch.float32)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[8]], ids="-".join, indirect=True)
def test_the_weights_are_shared(case: Case) -> None:
    """What is changed in the base's last matrix is changed in the adapted block's."""
    base, hidden = Model(Path(case.base.source.source), case.rung).block, case.base.hidden(1, 11)
    adapted = case.adapter.adapt(base, make_product)
    before = adapted.forward_dense(hidden)
    if isinstance(base, TransformerBlock):
        weight = base.weights.down
        assert isinstance(weight, torch.Tensor | PackedWeight)
        weight.data.zero_()
    else:
        assert isinstance(base, LayerBlock)
        base.layer.get_submodule("fc2").weight.data.zero_()
    assert (adapted.forward_dense(hidden) - before).norm() > 0.1 * before.norm()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model"), "llama", Rung.FUSED)


def test_a_step_leaves_the_fused_kernels_with_an_adapter_alone(llama: Case) -> None:
    """They know nothing of its terms; the base has them still."""
    assert isinstance(paged_span({INDEX: llama.base.block}, 1), NativeSpan)
    assert isinstance(paged_span({INDEX: llama.adapted}, 1), BlockByBlock)


@pytest.mark.parametrize("rung", [Rung.FUSED, Rung.PACKED])
@pytest.mark.parametrize(("dtype", "quantization"), [(torch.float32, "int8"), (torch.bfloat16, "none")])
def test_rounded_weights_take_an_adapter(
    llama: Case, rung: Rung, dtype: torch.dtype, quantization: Quantization
) -> None:
    """Terms in the block's dtype beside weights that are rounded, with a gradient and without."""
    base, storage = llama.base, WeightStorage.choose(dtype, CPU, quantization)
    block = Ladder(base.architecture, base.source, storage, 1).build(rung, INDEX)
    adapted, hidden = llama.adapter.adapt(block, make_product), base.hidden(1, 11).to(dtype)
    expected = llama.merged.block.forward_dense(hidden.float())
    for inputs in (hidden, hidden.clone().requires_grad_()):
        outputs = adapted.forward_dense(inputs)
        assert outputs.dtype == dtype
        assert (outputs - expected).norm() < 0.03 * (expected - hidden).norm()


@pytest.mark.parametrize("rung", [Rung.FUSED, Rung.PLAIN])
def test_an_adapter_of_other_blocks_changes_nothing(llama: Case, tmp_path: Path, rung: Rung) -> None:
    """The block itself comes back; no file is needed for it any more."""
    reference = make_tiny("llama", tmp_path / "model")
    tensors = draw_adapter(reference, ["model.layers.2.self_attn.q_proj"])
    path = write_adapter(tmp_path / "adapter", tensors)
    adapter = Adapter.open(ModelSource(str(path)), llama.base.architecture)
    (path / "adapter_model.safetensors").unlink()
    block = llama.base.ladder.build(rung, INDEX)
    assert adapter.adapt(block, make_product) is None
    with pytest.raises(WeightsError, match=r"adapter has no adapter_model\.safetensors"):
        adapter.adapt(llama.base.ladder.build(rung, 2), make_product)


def test_what_is_read_does_not_hang_on_the_file(llama: Case, tmp_path: Path) -> None:
    """An adapter that is written over in its place does not change a block that has it."""
    reference = make_tiny("llama", tmp_path / "model")
    tensors = draw_adapter(reference, [f"model.layers.{INDEX}.mlp.down_proj"])
    path = write_adapter(tmp_path / "adapter", tensors)
    adapted = Adapter.open(ModelSource(str(path)), llama.base.architecture).adapt(
        llama.base.block, make_product
    )
    before = adapted.forward_dense(llama.base.hidden(1, 3))
    file = path / "adapter_model.safetensors"
    with file.open("rb+") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(adapted.forward_dense(llama.base.hidden(1, 3)), before)
