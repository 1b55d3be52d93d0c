"""Which way of computing blocks is taken: the best one that agrees with transformers, tried once for each kind."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from petalsd import _C
from petalsd.config import Quantization
from petalsd.errors import ModelError
from petalsd.models import ladder as ladder_module
from petalsd.models import trial as trial_module
from petalsd.models.architecture import Architecture
from petalsd.models.block import TransformerBlock
from petalsd.models.gpu_products import GpuProducts
from petalsd.models.hf.attention import NativeCall
from petalsd.models.hf.block import LayerBlock
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.native_span import NativeSpan
from petalsd.models.source import ModelSource
from petalsd.models.spans import has_kernels
from petalsd.models.trial import Reference, Tokens
from petalsd.models.weight_storage import WeightStorage
from petalsd.ops import quantized_linear as quantized
from petalsd.ops.packed_weight import PackedWeight
from tests.tiny_models import LAYER_VARIANTS, make_tiny

CPU = torch.device("cpu")


def make_ladder(path: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Ladder:
    make_tiny(family, path, **overrides)
    source = ModelSource(str(path))
    return Ladder(Architecture.read(source.config()), source, WeightStorage.choose(dtype, CPU), num_threads=1)


def rungs(ladder: Ladder, kind: str = "uniform") -> list[tuple[Rung, bool]]:
    return [(trial.rung, trial.is_passed) for trial in ladder.choices[kind].trials]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma", "falcon"])
def test_the_best_rung_is_taken(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Fused for the families that have it, packed for the others; errors are far from what is tolerated."""
    ladder = make_ladder(tmp_path, family, dtype)
    block = ladder.load(0)
    best = Rung.FUSED if family == "llama" else Rung.PACKED
    assert isinstance(block, TransformerBlock if family == "llama" else LayerBlock)
    assert rungs(ladder) == [(best, True)]
    taken = ladder.choices["uniform"].taken
    assert 0 < taken.error < taken.tolerance / 2
    assert taken.kernels == _C.LayerTeam(1, "auto").tier


def test_without_packed_weights_the_plain_layer_serves(tmp_path: Path) -> None:
    """As on a GPU, or in a dtype that has no packed format."""
    ladder = make_ladder(tmp_path, "gemma", torch.float16)
    ladder.load(0)
    assert rungs(ladder) == [(Rung.PLAIN, True)]
    assert ladder.random_layer(0).nbytes == ladder.load(1).nbytes


def test_each_kind_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that differ in more than their weights are tried apart; the others take what was chosen."""
    family, overrides = LAYER_VARIANTS["gemma3_text"]
    ladder = make_ladder(tmp_path, family, **overrides)
    tried: list[int] = []
    original = trial_module.Tokens.through_passes
    monkeypatch.setattr(
        trial_module.Tokens,
        "through_passes",
        lambda tokens, block: (tried.append(block.index), original(tokens, block))[1],
    )
    for index in (2, 3, 0, 1):
        assert ladder.load(index).index == index
    assert tried == [2, 3]
    assert set(ladder.choices) == {"sliding_attention", "full_attention"}


def test_a_fused_block_that_is_wrong_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rejected with its figures, and the next rung serves."""
    original = ladder_module.load_block

    def load_wrong(*args: Any, **kwargs: Any) -> TransformerBlock:
        block = original(*args, **kwargs)
        block.weights.mlp_norm.mul_(1.01)
        return block

    monkeypatch.setattr(ladder_module, "load_block", load_wrong)
    ladder = make_ladder(tmp_path, "llama")
    with capture_logs() as events:
        assert isinstance(ladder.load(1), LayerBlock)
    assert rungs(ladder) == [(Rung.FUSED, False), (Rung.PACKED, True)]
    rejected = ladder.choices["uniform"].trials[0]
    assert rejected.tolerance < rejected.error < 0.05
    (event,) = [event for event in events if event["event"] == "block_path_rejected"]
    assert (event["path"], event["numeric_error"], event["log_level"]) == ("fused", rejected.error, "warning")


def test_a_kernel_that_is_wrong_for_decode_steps_alone_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and passes are right; one token in a later step is not."""
    original = NativeSpan.forward_paged

    def forward_wrong(self: NativeSpan, blocks: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        out = original(self, blocks, hidden, *args)
        if args[1].num_tokens == args[1].num_rows and args[1].context_lens[0] == trial_module.STEPS[0][0] + 3:
            out[0] += 0.01 * out[0]
        return out

    monkeypatch.setattr(NativeSpan, "forward_paged", forward_wrong)
    ladder = make_ladder(tmp_path, "llama")
    ladder.load(0)
    assert rungs(ladder) == [(Rung.FUSED, False), (Rung.PACKED, True)]


def test_a_gpus_products_of_many_rows_that_are_wrong_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no part of the steps that are enough on a CPU."""
    original = quantized.unpacked_linear

    def multiply_wrong(x: torch.Tensor, weight: PackedWeight, bias: Any, out: torch.Tensor) -> None:
        original(x, weight, bias, out)
        out.mul_(1.2)

    monkeypatch.setattr(quantized, "unpacked_linear", multiply_wrong)
    monkeypatch.setattr(Ladder, "_products", GpuProducts(CPU, 8))
    architecture = make_ladder(tmp_path, "phi").architecture
    storage = WeightStorage.choose(torch.float32, CPU, "int8")
    Ladder(architecture, ModelSource(str(tmp_path)), storage, num_threads=1).load(0)
    monkeypatch.setattr(ladder_module, "STEPS", (*trial_module.STEPS, trial_module.MANY_ROWS))
    with pytest.raises(ModelError, match="does not compute what transformers' layer does"):
        Ladder(architecture, ModelSource(str(tmp_path)), storage, num_threads=1).load(0)


def test_attention_by_kernels_that_is_wrong_leaves_it_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same rung, of the block that was tried and of those that follow."""

    class Wrong(NativeCall):
        def attend(self, *args: Any) -> torch.Tensor:
            return super().attend(*args) * 1.01

    monkeypatch.setattr("petalsd.models.hf.block.NativeCall", Wrong)
    ladder = make_ladder(tmp_path, "opt")
    loaded = [ladder.load(0), ladder.load(1)]
    assert rungs(ladder) == [(Rung.PACKED, False), (Rung.PACKED, True)]
    tier = _C.LayerTeam(1, "auto").tier
    assert [trial.kernels for trial in ladder.choices["uniform"].trials] == [tier, f"{tier}, torch"]
    assert not any(has_kernels(block) for block in loaded)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_wrong_window_fits_no_rung(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When even transformers' layer with our attention is wrong, nothing is served, and the error says so."""
    ladder = make_ladder(tmp_path, family, sliding_window=12)
    architecture = ladder.architecture
    wide = replace(architecture.config, windows=(11,) * 4)
    object.__setattr__(
        ladder, "architecture", replace(architecture, config=wide, fused=architecture.fused and wide)
    )
    original = trial_module.Tokens.through_layer

    def through_right_layer(tokens: Any, layer: Any, layers: Any, config: Any, *args: Any) -> torch.Tensor:
        return original(tokens, layer, layers, architecture.config, *args)

    monkeypatch.setattr(trial_module.Tokens, "through_layer", through_right_layer)
    with pytest.raises(ModelError, match=r"block 0 \(.*\) does not compute what transformers' layer does"):
        ladder.load(0)
    assert not ladder.choices


def test_a_way_that_fails_is_rejected_like_one_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in a kernel costs the rung, not the service."""

    def fail(*args: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(TransformerBlock, "forward_dense", fail)
    ladder = make_ladder(tmp_path, "llama")
    with capture_logs() as events:
        ladder.load(0)
    assert rungs(ladder) == [(Rung.FUSED, False), (Rung.PACKED, True)]
    assert ladder.choices["uniform"].trials[0].error == math.inf
    assert "block_path_failed" in {event["event"] for event in events}


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_want_of_memory_says_nothing_about_a_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Neither of the machine's nor of the GPU's: all blocks of the model would be computed in a slower way."""

    def fail(*_: object) -> torch.Tensor:
        raise error

    ladder = make_ladder(tmp_path, "llama")
    monkeypatch.setattr(Tokens, "through_passes", fail)
    with pytest.raises(type(error)):
        ladder.load(0)
    assert not ladder.choices
    monkeypatch.undo()
    ladder.load(0)
    assert rungs(ladder) == [(Rung.FUSED, True)]


def test_the_error_is_the_worst_tokens_relative_to_what_a_block_adds() -> None:
    """A block that adds little to large states is held to that; a sparse one by three quarters of its tokens."""
    entering = 100 * torch.ones(20, 8)
    expected = entering + torch.tensor([1.0, -1.0]).repeat(4)
    dense, sparse = (Reference(entering, expected, is_sparse) for is_sparse in (False, True))
    actual = expected.clone()
    actual[3, 0] += 0.8
    assert dense.error_of(actual) == pytest.approx(0.8 / 8**0.5, rel=1e-3)
    assert sparse.error_of(actual) == 0.0
    actual[3, 0] = torch.nan
    assert sparse.error_of(actual) == math.inf


@pytest.mark.parametrize(
    ("dtype", "layer_error", "expected"),
    [(torch.float32, 0.0, 1e-4), (torch.bfloat16, 0.001, 0.02), (torch.bfloat16, 0.02, 0.06)],
    ids=str,
)
def test_what_is_tolerated_follows_transformers_own_error(
    dtype: torch.dtype, layer_error: float, expected: float
) -> None:
    """Three times what its layer shows in the dtype, and never less than the dtype's floor."""
    tokens = Tokens((torch.zeros(4, 8),), steps=())
    wide = torch.ones(4, 8)
    reference = Reference.of(tokens, wide, wide + layer_error, dtype, is_sparse=False, is_quantized=False)
    assert reference.tolerance == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama", "gemma", "qwen3_moe"])
def test_quantized_weights_are_compared_by_their_values(
    variant: str, quantization: Quantization, tmp_path: Path
) -> None:
    """The rounding of the weights is wanted, so the reference has it too; unquantized ones are no way out.

    What remains is the rounding of activations, of a few percent.
    """
    family, overrides = LAYER_VARIANTS.get(variant, (variant, {}))
    make_tiny(family, tmp_path, **overrides)
    source = ModelSource(str(tmp_path))
    storage = WeightStorage.choose(torch.float32, CPU, quantization)
    ladder = Ladder(Architecture.read(source.config()), source, storage, num_threads=1)
    block = ladder.load(0)
    plain = Ladder(ladder.architecture, source, WeightStorage.choose(torch.float32, CPU)).load(0)
    assert block.nbytes < plain.nbytes / 2.5
    assert rungs(ladder) == [(Rung.FUSED if family == "llama" else Rung.PACKED, True)]
    assert 0.001 < ladder.choices["uniform"].taken.error < (0.08 if family == "gemma" else 0.05)
    assert Rung.PLAIN not in ladder.candidates()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_layer_that_makes_nonsense_is_not_served(family: str, tmp_path: Path) -> None:
    """Nothing can be compared with what transformers' own layer makes of such a configuration: NaN."""
    ladder = make_ladder(tmp_path, family, rms_norm_eps=-100.0)
    with pytest.raises(ModelError, match=r"block 0 \(uniform\) makes values that are not finite") as caught:
        ladder.load(0)
    assert "another revision" in caught.value.hint
    assert not ladder.choices


def test_a_dtype_that_is_too_narrow_for_a_model_is_told(tmp_path: Path) -> None:
    """As some models leave the range of float16; the error names another."""
    ladder = make_ladder(tmp_path, "gemma", torch.float16, initializer_range=100.0)
    with pytest.raises(ModelError, match=r"block 0 \(uniform\) .* not finite in float16") as caught:
        ladder.load(0)
    assert "bfloat16" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("ministral3", {"rope": "yarn"}, r"TypeError .*'NoneType'"),
        (
            "dots1",
            {**LAYER_VARIANTS["dots1"][1], "n_group": 2, "topk_group": 3},
            "RuntimeError .*out of range",
        ),
    ],
)
def test_what_transformers_own_layer_cannot_compute_is_told(
    family: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Options that do not fit together, which only the layer's code meets."""
    ladder = make_ladder(tmp_path, family, **overrides)
    with pytest.raises(ModelError, match=rf"block 2 \(.*\) cannot be computed by transformers.*: {reason}"):
        ladder.load(2)
    assert not ladder.choices
