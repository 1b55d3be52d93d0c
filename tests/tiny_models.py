"""Small random models in Hugging Face format, one per family and per kind of RoPE: the oracles of the tests.

Weights are drawn wide (unit gain) and norms and biases are random too, so that a dropped bias, a swapped norm or a
wrong head order changes the output by far more than any tolerance, and greedy choices are never near a tie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HIDDEN_SIZE = 64

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
}

ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.0 + 0.7 * i for i in range(8)],
    },
}
"""``rope_parameters`` for a head size of 16; ``rope_theta`` is added by ``make_tiny``."""

FAMILIES = tuple(_FAMILY)


def make_tiny(
    family: str, path: Path, seed: int = 0, *, max_shard_size: str | None = None, **overrides: Any
) -> PreTrainedModel:
    """Write a random float32 model of ``family`` to ``path`` (config.json, safetensors) and return it.

    ``overrides`` are keys of the family's config; ``rope="yarn"`` picks an entry of ROPE_VARIANTS.
    ``max_shard_size``, for instance ``"100KB"``, makes several shards and an index.
    """
    settings = {**_COMMON, **_FAMILY[family]}
    if rope := overrides.pop("rope", None):
        settings["rope_parameters"] = {"rope_theta": 10000.0, **ROPE_VARIANTS[rope]}
    config = CONFIG_MAPPING[family](**{**settings, **overrides}, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _randomize_vectors(model)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(path, **sharding)
    return model


def make_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer of one word for each token of a tiny model, ``w0`` to ``w255``, to ``path``; return it."""
    words = {f"w{index}": index for index in range(_COMMON["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(path)
    return fast


@torch.no_grad()
def _randomize_vectors(model: PreTrainedModel) -> None:
    """Norm weights start as ones and biases as zeros, which would hide a missing or swapped one."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0.0, 0.3)
        elif parameter.dim() == 1:
            parameter.uniform_(0.6, 1.4)
