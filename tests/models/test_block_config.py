"""Configurations of all families in one form, old spellings included, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.errors import ConfigError, ModelError, UnsupportedModel
from petalsd.models.block_config import BlockConfig
from petalsd.models.model_config import dtype_for
from tests.tiny_models import FAMILIES, ROPE_VARIANTS, make_tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family: str, tmp_path: Path) -> None:
    """The sizes that transformers wrote are the sizes that are read."""
    model = make_tiny(family, tmp_path)
    config = BlockConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    attention = model.model.layers[0].self_attn
    assert config.num_blocks == len(config.windows) == 4
    assert (config.num_heads, config.num_kv_heads, config.kv_groups) == (4, 2, 2)
    assert attention.q_proj.weight.shape == (config.num_heads * config.head_dim, config.hidden_size)
    assert config.qkv_bias == (attention.q_proj.bias is not None)
    assert config.output_bias == (attention.o_proj.bias is not None)
    assert config.qk_norm == hasattr(attention, "q_norm")
    assert config.tie_word_embeddings == (family == "qwen3")
    assert config.dtype == torch.float32


def test_windows_follow_each_familys_rule(tmp_path: Path) -> None:
    """Mistral's window is on all blocks, Qwen's from max_window_layers on or by layer_types, Llama has none."""
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 9, "max_window_layers": 3}
    layer_types = ["sliding_attention", "full_attention"] * 2
    assert BlockConfig.from_hf({**LLAMA, "sliding_window": 9}).windows == (None,) * 4
    assert BlockConfig.from_hf({**LLAMA, "model_type": "mistral", "sliding_window": 9}).windows == (9,) * 4
    assert (
        BlockConfig.from_hf({**LLAMA, "model_type": "mistral", "sliding_window": None}).windows == (None,) * 4
    )
    assert BlockConfig.from_hf(qwen).windows == (None,) * 4
    assert BlockConfig.from_hf({**qwen, "use_sliding_window": True}).windows == (None, None, None, 9)
    explicit = {**qwen, "model_type": "qwen3", "use_sliding_window": True, "layer_types": layer_types}
    assert BlockConfig.from_hf(explicit).windows == (9, None, 9, None)


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
def test_old_spelling_of_rope_scaling_means_the_same(variant: str) -> None:
    """``rope_theta`` and ``rope_scaling`` of older checkpoints give the same parameters as ``rope_parameters``."""
    new = {**LLAMA, "rope_parameters": {"rope_theta": 5e5, **ROPE_VARIANTS[variant]}}
    scaling = {
        ("type" if key == "rope_type" else key): value for key, value in ROPE_VARIANTS[variant].items()
    }
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": None if variant == "default" else scaling}
    expected = dict(BlockConfig.from_hf(new).rope)
    assert {key: value for key, value in BlockConfig.from_hf(old).rope.items() if key != "type"} == expected
    assert expected["rope_theta"] == 5e5


def test_defaults_come_from_transformers() -> None:
    """What a config.json leaves out is what transformers would use."""
    config = BlockConfig.from_hf({"model_type": "llama"})
    assert (config.num_blocks, config.hidden_size, config.num_kv_heads, config.head_dim) == (
        32,
        4096,
        32,
        128,
    )
    assert config.rope == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.dtype is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "falcon"}, "model_type = 'falcon'"),
        ({"model_type": None}, "model_type = None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq'"),
        ({"hidden_act": "relu6"}, "hidden_act = 'relu6'"),
        ({"dtype": "float64"}, "dtype = 'float64'"),
        ({"rope_parameters": {"rope_type": "zigzag", "rope_theta": 1e4}}, "rope_type = 'zigzag'"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_computed_here_is_refused(change: dict[str, Any], named: str) -> None:
    """UnsupportedModel names the key and its value."""
    with pytest.raises(UnsupportedModel) as caught:
        BlockConfig.from_hf({**LLAMA, **change})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_blocks = 0"),
        ({"num_attention_heads": 0}, "llama configuration"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window = -1"),
        (
            {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "sliding_window has no value",
        ),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], named: str) -> None:
    """ModelError names the key."""
    with pytest.raises(ModelError) as caught:
        BlockConfig.from_hf({**LLAMA, **change})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("given", "setting", "expected"),
    [
        ("float32", "auto", torch.bfloat16),
        (None, "auto", torch.bfloat16),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
    ],
)
def test_dtype_rule(given: str | None, setting: str, expected: torch.dtype) -> None:
    """Auto is the checkpoint's dtype, bfloat16 if that is float32 or absent; a named dtype is taken."""
    assert dtype_for(setting, BlockConfig.from_hf({**LLAMA, "torch_dtype": given}), CPU) == expected


def test_float16_is_for_gpus() -> None:
    """float16 is refused on a CPU, asked for or implied, and taken on CUDA."""
    config = BlockConfig.from_hf({**LLAMA, "dtype": "float16"})
    assert dtype_for("auto", config, CUDA) == dtype_for("float16", config, CUDA) == torch.float16
    for setting in ("auto", "float16"):
        with pytest.raises(ConfigError, match=r"model\.dtype.*CPU"):
            dtype_for(setting, config, CPU)
    with pytest.raises(ConfigError, match="one of auto, bfloat16"):
        dtype_for("int8", config, CPU)
