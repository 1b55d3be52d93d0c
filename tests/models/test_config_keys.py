"""Keys of a config.json that are missing, null or absurd: read as transformers does, or refused by their names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from petalsd.errors import ModelError
from petalsd.models.architecture import Architecture
from petalsd.models.hf.families import FAMILIES
from petalsd.models.ladder import make_angles
from tests.tiers import nightly_except
from tests.tiny_models import LAYER_VARIANTS, ROPE_VARIANTS, tiny_config

CPU = torch.device("cpu")
OF_ALL = frozenset(PreTrainedConfig().to_dict()) - {"tie_word_embeddings"}
"""Keys that say nothing of a family."""
DAILY = ("bloom", "cohere2", "falcon", "gemma3_text", "glm4_moe", "gpt_oss", "llama", "mixtral", "qwen3_moe")


def raw_config(family: str) -> dict[str, Any]:
    _, overrides = LAYER_VARIANTS.get(family, (family, {}))
    raw: dict[str, Any] = json.loads(json.dumps(tiny_config(family, **overrides).to_dict()))
    return raw


def look_at(raw: Mapping[str, Any]) -> Architecture:
    """All that is made of a config before weights are read."""
    architecture = Architecture.read(raw)
    kinds = {architecture.kind(index): index for index in range(architecture.config.num_blocks)}
    for index in kinds.values():
        architecture.layers.empty_layer(index, is_plain=True)
    architecture.head_rule()
    make_angles(architecture, torch.float32, CPU).tables(1)
    return architecture


@pytest.mark.parametrize("family", nightly_except(FAMILIES, *DAILY))
def test_a_key_without_a_value_is_a_default_or_an_error(family: str) -> None:
    """Nothing else comes of one than a model as transformers reads it, or a ModelError."""
    raw = raw_config(family)
    look_at(raw)
    for key in raw.keys() - OF_ALL:
        rest = {name: value for name, value in raw.items() if name != key}
        for changed in (rest, {**rest, key: None}):
            try:
                look_at(changed)
            except ModelError as error:
                assert "config.json" in error.message or " = " in error.message


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("hunyuan_v1_dense", {"head_dim": None}, "block 3: TypeError .*null or missing: head_dim"),
        ("ernie4_5_moe", {"moe_layer_interval": None}, "block 1: .*null or missing: moe_layer_interval"),
        ("granite", {"logits_scaling": 0}, "the head: ZeroDivisionError .*logits_scaling = 0"),
        (
            "mixtral",
            {"hidden_act": "zigzag"},
            "block 3: KeyError 'zigzag'; read last: .*hidden_act = 'zigzag'",
        ),
        ("mixtral", {"num_local_experts": -1}, "num_local_experts = -1"),
        ("mellum", {"mlp_layer_types": ["sparse"]}, r"4\) must be equal to the number of `mlp_layer_types`"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps = nan in config.json: a finite number"),
        ("gemma", {"rope_parameters": {"rope_theta": -math.inf}}, "rope_parameters.rope_theta = -inf"),
        *(
            (family, {"rope_parameters": {"rope_theta": 1e4, **rope}}, named)
            for family in ("llama", "gemma", "granite", "minimax_m2")
            for rope, named in (
                ({"rope_type": "default", "rope_theta": 0}, "rope_parameters = .* not finite"),
                ({"rope_type": "default", "rope_theta": -2.5}, "rope_parameters = .* not finite"),
                ({"rope_type": [1.0]}, "rope_"),
                ({"rope_type": "linear", "factor": 0}, "rope_parameters = .*'factor': 0"),
                ({**ROPE_VARIANTS["yarn"], "attention_factor": "x"}, "rope_parameters = .*: 'x'"),
                ({**ROPE_VARIANTS["yarn"], "attention_factor": [1.0]}, "rope_parameters = "),
                ({"rope_type": "default", "partial_rotary_factor": 1e12}, "partial_rotary_factor"),
                ({"rope_type": "default", "partial_rotary_factor": -1}, "partial_rotary_factor"),
                ({**ROPE_VARIANTS["longrope"], "original_max_position_embeddings": -1}, "original_max_pos"),
            )
        ),
    ],
)
def test_a_key_that_makes_no_sense_is_named(family: str, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        look_at({**raw_config(family), **change})


@pytest.mark.parametrize("value", [10**12, 10**30])
@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "num_hidden_layers"), ("bloom", "n_layer"), ("gpt_oss", "num_hidden_layers"),
        ("llama", "hidden_size"), ("mixtral", "hidden_size"), ("llama", "vocab_size"), ("gemma", "vocab_size"),
        ("llama", "intermediate_size"), ("mixtral", "intermediate_size"), ("llama", "num_attention_heads"),
        ("gemma", "head_dim"), ("qwen3_moe", "num_local_experts"), ("gpt_oss", "num_local_experts"),
        ("dots1", "n_routed_experts"), ("mixtral", "sliding_window"), ("gemma", "max_position_embeddings"),
    ],
)  # fmt: skip
def test_an_absurd_size_is_an_error_and_no_allocation(family: str, key: str, value: int) -> None:
    """Before lists of that length are made, or tensors."""
    with pytest.raises(ModelError, match=f"{value}"):
        look_at({**raw_config(family), key: value})


def test_a_config_of_great_depth_is_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(600):
        nested = {"a": nested}
    with pytest.raises(ModelError, match=r"config\.json"):
        look_at({**raw_config("llama"), "rope_parameters": nested})
