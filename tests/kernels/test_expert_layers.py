"""Sparse layers as a GPU computes them: experts by kernels where tokens are few, as transformers has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from benchmarks.gpu.variants import meta
from petalsd.config import Quantization
from petalsd.models import gpu_products
from petalsd.models.architecture import Architecture
from petalsd.models.gpu_products import GpuProducts
from petalsd.models.hf.block import LayerBlock
from petalsd.models.hf.experts import MAX_TOKENS, KernelExperts, experts_are_capturable
from petalsd.models.hf.families import family_of
from petalsd.models.hf.family import ExpertNames
from petalsd.models.hf.layer import Layers
from petalsd.models.hf.packing import PackedExperts, layer_nbytes
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.ops.decode_batch import DECODE_BUCKETS
from petalsd.ops.expert_gate import ActivationGate
from petalsd.ops.launching import record_launches
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from tests.device import DEVICE
from tests.kernels.sparse_layers import SPARSE_FAMILIES, layers_of, sparse_pair, with_kernels
from tests.numeric import assert_close
from tests.tiers import nightly_except
from tests.tiny_models import LAYER_VARIANTS, make_tiny

FORMATS = [None, WeightFormat.INT8, WeightFormat.INT4]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
META = torch.device("meta")


def stack_without_memory(weights: torch.Tensor, format: WeightFormat, device: torch.device) -> PackedWeight:
    num_out, num_in = weights.shape[0] * weights.shape[1], weights.shape[2]
    return PackedWeight.empty(format, num_out, num_in, lambda shape, dtype: meta(*shape, dtype=dtype))


@pytest.mark.parametrize(
    ("format", "dtype"), [(None, torch.float32), *((format, torch.float16) for format in FORMATS)], ids=str
)
@pytest.mark.parametrize("family", nightly_except(SPARSE_FAMILIES, "gpt_oss", "qwen2_moe"))
def test_they_are_transformers_experts(family: str, format: WeightFormat | None, dtype: torch.dtype) -> None:
    """In steps of one token and of some, and in a prefill of more than kernels take; routed by the same router."""
    theirs, ours = sparse_pair(family, format, dtype)
    assert isinstance(ours.experts, KernelExperts)
    for num_tokens in (1, 20, MAX_TOKENS + 1):
        x = torch.randn(1, num_tokens, 64).to(dtype)
        expected = theirs(x)
        scale = float(expected.float().abs().max())
        assert_close(ours(x) / scale, expected / scale, TOLERANCE[dtype], TOLERANCE[dtype], family)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_any_activation_gates(activation: str) -> None:
    theirs, ours = sparse_pair("mixtral", None, hidden_act=activation)
    x = torch.randn(1, 3, 64)
    assert_close(ours(x), theirs(x), 1e-4, 1e-4, activation)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("format", FORMATS)
def test_padding_disturbs_nobody(format: WeightFormat | None, family: str) -> None:
    """Rows of NaN, whose router cannot choose: the others are what they would be beside any other rows."""
    _, ours = sparse_pair(family, format)
    x, padded = torch.randn(1, 8, 64), torch.randn(1, 8, 64)
    padded[:, 3:] = float("nan")
    padded[:, :3] = x[:, :3]
    assert torch.equal(ours(padded)[:, :3], ours(x)[:, :3])


def test_an_expert_that_does_not_exist_reads_nothing_outside() -> None:
    _, ours = sparse_pair("mixtral", None)
    index, weights = torch.tensor([[0, 1], [99, -7]]), torch.rand(2, 2)
    x = torch.randn(2, 64)
    found, expected = ours.experts(x, index, weights), ours.experts(x[:1], index[:1], weights[:1])
    assert_close(found[:1], expected, 1e-5, 1e-5, "the other token")
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("format", FORMATS)
def test_no_step_asks_the_host(
    format: WeightFormat | None, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without memory have no values that could be asked for, and what is launched depends on none."""
    monkeypatch.setattr(gpu_products, "pack_stack", stack_without_memory)
    layer, products = layers_of(family).random(0, torch.bfloat16, META), GpuProducts(META, 8)
    if format is None:
        products.replace_experts(layer, ExpertNames())
        experts: Any = layer.get_submodule("mlp.experts")
    else:
        experts = products.pack_experts(layer.get_submodule("mlp.experts"), format)
    product = "expert_linear_kernel" if format is None else "quantized_expert_linear_kernel"
    expected = ["expert_order_kernel", product, "gated_activation_kernel", product, "expert_sum_kernel"]
    for num_tokens in DECODE_BUCKETS:
        hidden, weights = meta(num_tokens, 64), meta(num_tokens, 2, dtype=torch.float32)
        index = meta(num_tokens, 2, dtype=torch.int64)
        with record_launches(90) as launches, torch.inference_mode():
            out = experts(hidden, index, weights)
        assert (out.shape, out.dtype) == (hidden.shape, hidden.dtype)
        assert [one.kernel.__name__ for one in launches] == expected
    with pytest.raises((RuntimeError, NotImplementedError)):
        experts.whole(hidden, index, weights)


def test_steps_of_all_buckets_are_few_enough() -> None:
    """What is captured never goes expert by expert."""
    assert DECODE_BUCKETS[-1] <= MAX_TOKENS


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
@pytest.mark.parametrize("format", FORMATS)
def test_gradients_go_expert_by_expert(format: WeightFormat | None, family: str) -> None:
    """They are transformers', of the router too; without one the same module asks its kernels."""
    theirs, ours = sparse_pair(family, format)
    grads = []
    for module in (theirs, ours):
        x = torch.linspace(-1, 1, 3 * 64).view(1, 3, 64).requires_grad_()
        with record_launches() as launches:
            module(x).square().sum().backward()
        assert not any("expert" in one.kernel.__name__ for one in launches)
        assert x.grad is not None
        grads.append(x.grad / x.grad.abs().max())
    assert_close(grads[1], grads[0], 1e-4, 1e-4, "gradient")
    with record_launches() as launches, torch.no_grad():
        ours(torch.randn(1, 3, 64, requires_grad=True))
    assert any("expert" in one.kernel.__name__ for one in launches)


@pytest.mark.parametrize("format", FORMATS)
def test_biases_are_counted(format: WeightFormat | None) -> None:
    """gpt-oss's, in float32 beside packed weights."""
    layers = layers_of("gpt_oss")
    plain, products = layers.random(0, torch.float16, DEVICE), GpuProducts(DEVICE, 8)
    experts: Any = plain.get_submodule("mlp.experts")
    whole, biases = layer_nbytes(plain), experts.biases.nbytes
    if format is None:
        assert layer_nbytes(with_kernels(layers, plain, None)) == whole
        return
    packed: Any = products.pack_experts(experts, format).whole
    weights = sum(product.nbytes for product in (*packed.gate_up, *packed.down))
    assert packed.nbytes == weights + 2 * biases


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_held_twice(format: WeightFormat | None) -> None:
    """A layer takes what it took without kernels, and what was planned."""
    layers = layers_of("olmoe")
    plain = layers.random(0, torch.float16, DEVICE)
    whole = layer_nbytes(plain)
    layer = with_kernels(layers, plain, format)
    if format is None:
        assert layer_nbytes(layer) == whole
        return
    storage = WeightStorage.choose(torch.float16, torch.device("cuda"), format.value)
    routed = layer.get_submodule("mlp.gate")
    rest = sum(parameter.nbytes for parameter in layer.parameters())
    matrices = [
        shape for shape in layers.shapes(0) if len(shape) == 2 and shape != tuple(routed.weight.shape)
    ]
    assert layer_nbytes(layer) == rest + storage.nbytes(matrices)
    assert all(parameter.dim() < 3 for parameter in layer.parameters())


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("format", FORMATS)
def test_sizes_that_do_not_fit_stay_as_they_were(format: WeightFormat | None, family: str) -> None:
    """An inner size that is no multiple of 16: right, and not said to be capturable."""
    theirs, ours = sparse_pair(family, format, moe_intermediate_size=24, intermediate_size=24)
    assert not isinstance(ours.experts, KernelExperts)
    assert not experts_are_capturable(ours)
    x = torch.randn(1, 5, 64)
    assert_close(ours(x), theirs(x), 1e-4, 1e-4, "layer")


@pytest.mark.parametrize("differing", ["is_transposed", "bias", "gate"])
def test_experts_of_another_kind_stay_as_they_were(differing: str) -> None:
    """As other families of transformers have them."""
    layers = layers_of("mixtral")
    layer = layers.random(0, torch.float16, DEVICE)
    experts: Any = layer.get_submodule("mlp.experts")
    if differing == "is_transposed":
        experts.is_transposed = True
    elif differing == "bias":
        experts.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 192))
    else:
        experts._apply_gate = experts.forward
    assert with_kernels(layers, layer, None).get_submodule("mlp.experts") is experts


def test_what_is_capturable() -> None:
    """Layers without experts; not those whose experts are transformers' or packed one by one."""
    layers = layers_of("qwen3_moe")  # whose second layer is dense
    assert experts_are_capturable(layers.empty_layer(1))
    assert not experts_are_capturable(layers.empty_layer(0))
    assert not experts_are_capturable(nn.Sequential(PackedExperts(ActivationGate(nn.SiLU()), [], [])))
    name, settings = LAYER_VARIANTS["phi3"]  # whose dense MLP has a gate_up_proj
    dense = Layers(family_of(name), CONFIG_MAPPING[name](**settings))
    assert experts_are_capturable(dense.empty_layer(0))


@pytest.mark.parametrize(("quantization", "rung"), [("none", Rung.PLAIN), ("int4", Rung.PACKED)])
def test_a_ladder_builds_them(
    quantization: Quantization, rung: Rung, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both rungs of a GPU, with a trial that they pass, and where weights mean nothing; dense layers too."""
    monkeypatch.setattr(Ladder, "_products", GpuProducts(DEVICE, 8))
    family, settings = LAYER_VARIANTS["qwen3_moe"]
    make_tiny(family, tmp_path, **{**settings, "num_hidden_layers": 2})
    source, storage = ModelSource(str(tmp_path)), WeightStorage.choose(torch.float16, DEVICE, quantization)
    ladder = Ladder(Architecture.read(source.config()), source, storage, num_threads=1)
    for block in (ladder.load(0), ladder.load(1), ladder.random_layer(0)):
        assert isinstance(block, LayerBlock)
        assert experts_are_capturable(block.layer)
        kept = [isinstance(module, KernelExperts) for module in block.layer.modules()]
        assert kept.count(True) == (block.index == 0)
    assert ladder.choices["uniform"].taken.rung is rung
    assert len(ladder.choices["uniform"].trials) == 1


@pytest.mark.parametrize(
    ("quantization", "rung"),
    [
        ("none", Rung.PLAIN),
        pytest.param("int8", Rung.PACKED, marks=pytest.mark.nightly),
        pytest.param("int4", Rung.PACKED, marks=pytest.mark.nightly),
    ],
)
def test_the_trial_tries_the_kernels_of_gpt_oss(
    quantization: Quantization, rung: Rung, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pass at once; wrong biases do not, and then experts are computed one by one."""
    monkeypatch.setattr(Ladder, "_products", GpuProducts(DEVICE, 8))
    family, settings = LAYER_VARIANTS["gpt_oss"]
    make_tiny(family, tmp_path, **settings)
    source, storage = ModelSource(str(tmp_path)), WeightStorage.choose(torch.float16, DEVICE, quantization)
    ladder = Ladder(Architecture.read(source.config()), source, storage, num_threads=1)
    with record_launches() as launches:
        block = ladder.load(0)
    assert isinstance(block, LayerBlock) and block.is_capturable
    assert "gated_activation_kernel" in {one.kernel.__name__ for one in launches}
    (choice,) = ladder.choices.values()
    assert (choice.taken.rung, len(choice.trials)) == (rung, 1)
    monkeypatch.setattr(gpu_products, "_by_product", lambda biases: (biases.gate_up + 1, biases.down))
    again = Ladder(ladder.architecture, source, storage, num_threads=1)
    again.load(0)
    (choice,) = again.choices.values()
    assert [trial.uses_kernels for trial in choice.trials] == [True, False]
