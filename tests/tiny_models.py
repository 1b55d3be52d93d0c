"""Small random models in Hugging Face format, one per family and per kind of RoPE: the oracles of the tests.

Weights are drawn wide (unit gain) and norms and biases are random too, so that a dropped bias, a swapped norm or a
wrong head order changes the output by far more than any tolerance, and greedy choices are never near a tie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

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
"""Those with a fused block."""

_SPARSE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5, "norm_topk_prob": True,
}  # fmt: skip
_GRANITE: dict[str, Any] = {
    "attention_multiplier": 0.2, "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
}  # fmt: skip
_GROWN_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(4)],
    "long_factor": [1.0 + 0.7 * i for i in range(4)],
}
_NTK_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}
_LLAMA4_SCALING: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_MSCALED_ROPE: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# Its model adds the biases to the mask as well, so that transformers' eager attention counts them twice.
_ALIBI = {
    "attn_implementation": "sdpa",
    "alibi": True,
    "multi_query": False,
    "parallel_attn": False,
    "bias": True,
}

LAYER_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {"mlp_bias": True}),
    "bloom": ("bloom", {}),
    "bloom-6-heads": ("bloom", {"num_attention_heads": 6, "hidden_size": 96, "seq_length": 300}),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {"sliding_window": 12, "sliding_window_pattern": 2}),
    "cohere2_moe": (
        "cohere2_moe", {**_SPARSE, "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 96,
                        "num_shared_experts": 1, "sliding_window": 12, "sliding_window_pattern": 2, "head_dim": 16,
                        "rms_norm_eps": 1e-5, "expert_selection_fn": "sigmoid", "logit_scale": 0.5},
    ),
    "cohere2_moe-layer-norm": (
        "cohere2_moe", {**_SPARSE, "sliding_window": 12, "sliding_window_pattern": 2, "head_dim": 16},
    ),
    "cwm": (
        "cwm", {"sliding_window": 12, "head_dim": 16, "rope": "default", "bos_token_id": 0, "eos_token_id": 0},
    ),
    "deepseek_v3": (
        "deepseek_v3", {**_ROUTED, **_LATENT, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
                        "attention_bias": True, "rope_parameters": _MSCALED_ROPE},
    ),
    "deepseek_v3-plain-queries": (
        "deepseek_v3", {**_ROUTED, **_LATENT, "first_k_dense_replace": 4, "q_lora_rank": None, "v_head_dim": 48,
                        "rope_interleave": False},
    ),
    "dots1": (
        "dots1", {**_ROUTED, "first_k_dense_replace": 1, "sliding_window": 12, "max_window_layers": 2,
                  "head_dim": 16},
    ),
    "ernie4_5": ("ernie4_5", {"use_bias": True, "head_dim": 16}),
    "ernie4_5_moe": (
        "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1,
                         "moe_layer_interval": 1, "head_dim": 16, "use_bias": True},
    ),
    "exaone4": ("exaone4", {"sliding_window": 12, "sliding_window_pattern": 2}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "exaone_moe": (
        "exaone_moe", {**_SPARSE, "moe_intermediate_size": 32, "sliding_window": 12, "sliding_window_pattern": 2,
                       "first_k_dense_replace": 1, "head_dim": 16},
    ),
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", _ALIBI),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-new-one-norm": (
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "flex_olmo": ("flex_olmo", _SPARSE),
    "gemma": ("gemma", {"head_dim": 24}),
    "gemma2": (
        "gemma2", {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24,
                   "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": (
        "gemma3_text", {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24,
                        "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "glm4_moe": (
        "glm4_moe", {**_ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True,
                     "head_dim": 16, "n_group": 2, "topk_group": 1},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**_ROUTED, **_LATENT, "v_head_dim": 32}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt_oss": ("gpt_oss", {**_LOCAL, "head_dim": 16, "sliding_window": 12, "swiglu_limit": 1.5}),
    "granite": ("granite", _GRANITE),
    "granitemoe": ("granitemoe", {**_GRANITE, **_LOCAL}),
    "granitemoeshared": ("granitemoeshared", {**_GRANITE, **_LOCAL, "shared_intermediate_size": 48}),
    "helium": ("helium", {"head_dim": 16}),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense", {"head_dim": 16, "rope_parameters": _NTK_ALPHA, "max_position_embeddings": 32},
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe", {"num_experts": 4, "moe_topk": [2] * 4, "head_dim": 16, "rope_parameters": _NTK_ALPHA},
    ),
    "hy_v3": ("hy_v3", {**_SPARSE, "moe_intermediate_size": 32, "head_dim": 16}),
    "hyperclovax": ("hyperclovax", {**_GRANITE, "use_post_norm": True}),
    "jais2": ("jais2", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "mellum": (
        "mellum", {**_SPARSE, "moe_intermediate_size": 32, "head_dim": 16, "sliding_window": 12,
                   "layer_types": ["sliding_attention", "full_attention"] * 2,
                   "mlp_layer_types": ["dense"] + ["sparse"] * 3},
    ),
    "ministral": (
        "ministral", {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12,
                      "head_dim": 16, "rope": "default"},
    ),
    "ministral3": ("ministral3", {"rope_parameters": _LLAMA4_SCALING, "sliding_window": None, "head_dim": 16}),
    "minicpm3": ("minicpm3", {**_LATENT, "dim_model_base": 32}),
    "minimax_m2": ("minimax_m2", {**_LOCAL, "head_dim": 16, "rotary_dim": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 12}),
    "olmo": ("olmo", {"clip_qkv": 1.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 12}),
    "olmoe": ("olmoe", _SPARSE),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN_SIZE}),
    "opt-post-norm": (
        "opt", {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN_SIZE, "do_layer_norm_before": False},
    ),
    "phi": ("phi", {"qk_layernorm": True}),
    "phi3": ("phi3", {"sliding_window": 12}),
    "phi3-longrope": (
        "phi3", {"max_position_embeddings": 512, "original_max_position_embeddings": 32,
                 "rope_parameters": {**_GROWN_ROPE, "partial_rotary_factor": 0.5}},
    ),
    "phimoe": (
        "phimoe", {**_LOCAL, "lm_head_bias": True, "attention_bias": True, "sliding_window": 12,
                   "rope": "default"},
    ),
    "qwen2_moe": (
        "qwen2_moe", {**_SPARSE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
                      "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe", {**_SPARSE, "moe_intermediate_size": 32, "head_dim": 16, "mlp_only_layers": [1]},
    ),
    "seed_oss": (
        "seed_oss", {"head_dim": 16, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "solar_open": ("solar_open", {**_ROUTED, "head_dim": 16}),
    "starcoder2": ("starcoder2", {"sliding_window": 12}),
    "vaultgemma": (
        "vaultgemma", {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24,
                       "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "youtu": ("youtu", _LATENT),
}  # fmt: skip
"""Families without a fused block, and their settings."""


def make_tiny(
    family: str, path: Path, seed: int = 0, *, max_shard_size: str | None = None, **overrides: Any
) -> PreTrainedModel:
    """Write a random float32 model of ``family`` to ``path`` (config.json, safetensors) and return it.

    ``overrides`` are keys of the family's config; ``rope="yarn"`` picks an entry of ROPE_VARIANTS.
    ``max_shard_size``, for instance ``"100KB"``, makes several shards and an index.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _randomize_vectors(model)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(path, **sharding)
    return model


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Of the model that ``make_tiny`` makes of the same."""
    settings = {**_COMMON, **_FAMILY.get(family, {})}
    if rope := overrides.pop("rope", None):
        settings["rope_parameters"] = {"rope_theta": 10000.0, **ROPE_VARIANTS[rope]}
    return CONFIG_MAPPING[family](**{"attn_implementation": "eager", **settings, **overrides})


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
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            tensor.normal_(0.0, 0.3)
        elif tensor.dim() == 1:
            tensor.uniform_(0.6, 1.4)
