"""What is read from the configurations of families without a fused block, and why models are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from petalsd.config import Quantization
from petalsd.errors import ModelError, UnsupportedModel, WeightsError
from petalsd.models.architecture import Architecture
from petalsd.models.head_rule import HeadRule
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.rope import LengthRegimes
from petalsd.models.source import SINGLE_FILE, ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.types import BlockSpan
from tests.numeric import assert_close
from tests.reference_layers import decoder_layers, through_layers
from tests.tiny_models import LAYER_VARIANTS, make_tiny, tiny_config

CPU = torch.device("cpu")
GEMMA: dict[str, Any] = {"model_type": "gemma", "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}
MSCALES: dict[str, Any] = {"short_mscale": 1.2, "long_mscale": 1.5, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
def test_sizes_are_those_of_the_model(variant: str, tmp_path: Path) -> None:
    """Blocks, hidden size, and the tensors of the largest block."""
    family, overrides = LAYER_VARIANTS[variant]
    model = make_tiny(family, tmp_path, **overrides)
    architecture = Architecture.read(json.loads((tmp_path / "config.json").read_text()))
    config = architecture.config
    sizes = [sum(tensor.numel() for tensor in layer.state_dict().values()) for layer in decoder_layers(model)]
    counted = sum(math.prod(shape) for shape in architecture.largest_block())
    assert (config.num_blocks, counted) == (4, max(sizes))
    assert config.hidden_size == model.config.hidden_size
    assert len(config.windows) == 4


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("variant", ["granitemoe", "mixtral", "gpt_oss"])
def test_experts_take_what_is_counted(variant: str, quantization: Quantization, tmp_path: Path) -> None:
    """In every format, whether files hold them one by one or all in one tensor; biases are kept in float32."""
    family, overrides = LAYER_VARIANTS[variant]
    make_tiny(family, tmp_path, **overrides)
    source, storage = ModelSource(str(tmp_path)), WeightStorage.choose(torch.bfloat16, CPU, quantization)
    architecture = Architecture.read(source.config())
    block = Ladder(architecture, source, storage, num_threads=1).build(Rung.PACKED, 0)
    assert block.nbytes == pytest.approx(storage.nbytes(architecture.largest_block()), rel=0.05)


@pytest.mark.parametrize(
    "variant",
    [
        "bloom", "cohere", "falcon", "gemma", "glm4", "gpt_neox", "granite", "ministral3", "mixtral", "olmo",
        "olmo2", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen3_moe", "starcoder2",
    ],
)  # fmt: skip
def test_windows_are_those_that_transformers_reads(variant: str, tmp_path: Path) -> None:
    """Some families know one window for all layers, some none at all, whatever else is written down."""
    family, overrides = LAYER_VARIANTS[variant]
    layer_types = ["full_attention", "sliding_attention"] * 2
    others = {"sliding_window": 3, "use_sliding_window": True, "layer_types": layer_types}
    model = make_tiny(family, tmp_path, **{**overrides, **others})
    source, storage = ModelSource(str(tmp_path)), WeightStorage.choose(torch.float32, CPU)
    ladder = Ladder(Architecture.read(source.config()), source, storage, num_threads=1)
    hidden = torch.randn(1, 12, ladder.architecture.config.hidden_size)
    for index in range(2):
        with torch.no_grad():
            expected = through_layers(model, hidden, BlockSpan(index, index + 1))
            actual = ladder.build(Rung.PLAIN, index).forward_dense(hidden)
        assert_close(actual, expected, 1e-4, 1e-4, f"block {index}")


@pytest.mark.parametrize(
    ("variant", "kv_heads", "max_positions"),
    [
        ("bloom", 4, 2048),
        ("bloom-6-heads", 6, 300),
        ("falcon", 1, 512),
        ("falcon-alibi", 4, 512),
        ("falcon-new", 2, 512),
        ("gemma", 2, 512),
        ("gpt_neox", 4, 512),
        ("opt", 4, 512),
    ],
)
def test_a_cache_holds_as_many_heads_as_the_attention_has(
    variant: str, kv_heads: int, max_positions: int, tmp_path: Path
) -> None:
    """Families that share no keys say so in different ways, and linear biases have no longest sequence."""
    family, overrides = LAYER_VARIANTS[variant]
    make_tiny(family, tmp_path, **overrides)
    config = Architecture.read(json.loads((tmp_path / "config.json").read_text())).config
    assert (config.num_kv_heads, config.max_positions) == (kv_heads, max_positions)


def test_a_family_by_another_name() -> None:
    """As the repository says whose code transformers' has replaced."""
    family, overrides = LAYER_VARIANTS["deepseek_v3"]
    raw = tiny_config(family, **overrides).to_dict()
    known, renamed = (Architecture.read({**raw, "model_type": name}) for name in ("deepseek_v3", "kimi_k2"))
    assert renamed.config == known.config
    assert renamed.kind(3) == known.kind(3)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"model_type": "nemotron"}, "hands nothing on to its attention"),
        ({"model_type": "diffllama"}, "two softmaxes"),
        ({"model_type": "llama4_text"}, "chunks"),
        ({"model_type": "deepseek_v2"}, "model_type = 'deepseek_v2' is not served: its rotary angles"),
        ({"model_type": "mistral4"}, "text and images alone"),
        ({"model_type": "qwen3_next"}, "recurrent state"),
        ({"model_type": "gemma3n_text"}, "of other layers, which may be on another server"),
        ({"model_type": "qwen3_vl"}, "positions have three axes"),
        ({"model_type": "gpt17"}, "'gpt17' is not served by this version"),
        ({}, "model_type = None"),
        ({**GEMMA, "quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'"),
        ({**GEMMA, "dtype": "float64"}, "dtype = 'float64'"),
        *(
            (
                {**GEMMA, "model_type": family, "per_layer_config": {"1": {"rms_norm_eps": 0.5}}},
                "per_layer_config = ",
            )
            for family in ("gemma", "qwen2")
        ),
        *(
            (
                {**GEMMA, "model_type": family, "use_bidirectional_attention": True},
                "use_bidirectional_attention = True",
            )
            for family in ("gemma", "gemma2", "gemma3_text")
        ),
        *(
            ({**GEMMA, "model_type": family, "is_causal": False}, "is_causal = False")
            for family in ("gemma", "mixtral", "qwen2")
        ),
        ({**GEMMA, "model_type": "olmo3", "layer_types": ["linear_attention"] * 2}, "linear_attention"),
        (
            {**GEMMA, "model_type": "phimoe", "rope_scaling": {"type": "linear", "factor": 2.0, **MSCALES}},
            "rope_parameters.rope_type = 'linear'",
        ),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(raw: dict[str, Any], named: str) -> None:
    """UnsupportedModel, which lists what is served."""
    with pytest.raises(UnsupportedModel) as caught:
        Architecture.read(raw)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "big"}, "gemma configuration"),
        ({"dtype": ["bfloat16", "float16"]}, "gemma configuration"),
        ({"dtype": []}, "gemma configuration"),
        ({"num_hidden_layers": 0}, "num_blocks = 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window has no value"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], named: str) -> None:
    """ModelError names the key."""
    with pytest.raises(ModelError) as caught:
        Architecture.read({**GEMMA, **change})
    assert named in str(caught.value)


@pytest.mark.parametrize("family", ["granite", "gpt_neox", "phi3", "mistral"])
def test_where_angles_begin_to_depend_on_the_length(family: str) -> None:
    """Also where the original length stands beside the scaling, and not in it."""
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    raw = {
        "model_type": family,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": None,
        "rope_scaling": rope,
        "rotary_pct": 1.0,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 48,
    }
    config = Architecture.read(raw).config
    regimes = LengthRegimes.read(config.rope, config.max_positions)
    assert regimes == LengthRegimes("longrope", 48)


@pytest.mark.parametrize("family", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_dynamic_angles_with_a_fixed_alpha_depend_on_no_length(family: str) -> None:
    """As published; without an alpha they do."""
    for alpha, regimes in ((1000.0, None), (None, LengthRegimes("dynamic", 64))):
        rope = {"type": "dynamic", "factor": 2.0, "alpha": alpha}
        raw = {
            "model_type": family,
            "rope_scaling": rope,
            "max_position_embeddings": 64,
            "pad_token_id": None,
        }
        config = Architecture.read(raw).config
        assert LengthRegimes.read(config.rope, config.max_positions) == regimes


@pytest.mark.parametrize(("variant", "prefix"), [("bloom", "transformer."), ("opt", "model.")])
def test_checkpoints_without_the_models_own_prefix_are_read(
    variant: str, prefix: str, tmp_path: Path
) -> None:
    """The first BLOOM and OPT files were saved from the model without its head."""
    family, overrides = LAYER_VARIANTS[variant]
    make_tiny(family, tmp_path, **overrides)
    tensors = load_file(tmp_path / SINGLE_FILE)
    assert all(name.startswith(prefix) for name in tensors if "lm_head" not in name)
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, tmp_path / SINGLE_FILE)
    source = ModelSource(str(tmp_path))
    ladder = Ladder(Architecture.read(source.config()), source, WeightStorage.choose(torch.float32, CPU))
    assert ladder.load(1).index == 1
    assert not any(name.startswith(prefix) for name in ladder.architecture.tensor_names(1, source))


@pytest.mark.parametrize("variant", ["minimax_m2", "mixtral", "qwen3_moe"])
def test_experts_are_read_from_tensors_of_their_own(variant: str, tmp_path: Path) -> None:
    """As checkpoints hold them, one by one; a missing one is named."""
    family, overrides = LAYER_VARIANTS[variant]
    make_tiny(family, tmp_path, **overrides)
    source = ModelSource(str(tmp_path))
    architecture = Architecture.read(source.config())
    experts = [name for name in architecture.tensor_names(2, source) if ".experts." in name]
    assert len(experts) == 4 * 3
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors.pop(experts[5])
    save_file(tensors, tmp_path / SINGLE_FILE)
    damaged = ModelSource(str(tmp_path))
    with pytest.raises(WeightsError, match=experts[5].replace(".", r"\.")):
        Ladder(architecture, damaged, WeightStorage.choose(torch.float32, CPU)).load(2)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    """No tensor with the family's names: the error says where one should have been."""
    make_tiny("gemma", tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, tmp_path / SINGLE_FILE)
    source = ModelSource(str(tmp_path))
    with pytest.raises(WeightsError, match=r"no file holds tensors called model\.layers\.0\."):
        Ladder(Architecture.read(source.config()), source, WeightStorage.choose(torch.float32, CPU)).load(0)


def test_heads_differ_by_family() -> None:
    """What the config says, and what the family's code has."""
    assert Architecture.read({"model_type": "mixtral"}).head_rule() == HeadRule(norm_eps=1e-5)
    assert Architecture.read(GEMMA).head_rule() == HeadRule(embedding_scale=8.0, norm_offset=1.0)
    assert Architecture.read({"model_type": "cohere"}).head_rule().logit_scale == 0.0625
