"""The families that are served: one row for each ``model_type``, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from petalsd.errors import UnsupportedModel
from petalsd.models.head_rule import HeadRule
from petalsd.models.hf import heads
from petalsd.models.hf.family import ExpertNames, Family, same_kind
from petalsd.models.hf.fp8 import FP8
from petalsd.models.hf.gpt_oss import MXFP4, GptOssExpertNames
from petalsd.models.hf.linear_biases import bloom_arguments, falcon_arguments
from petalsd.models.model_config import sees_ahead

_OPT_PREFIXES = ("model.decoder.layers.", "decoder.layers.")
_NEOX_PREFIXES = ("gpt_neox.layers.", "layers.")
_PETALS_PREFIXES = ("transformer.h.", "h.")
_CORRECTION = "mlp.gate.e_score_correction_bias"
_GRANITE_EXPERTS = ExpertNames(module="block_sparse_moe.experts", in_files=None)
_GRANITE_RENAMES = MappingProxyType(
    {
        "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
        "block_sparse_moe.router.": "block_sparse_moe.router.layer.",
    }
)


def family_of(model_type: object) -> Family:
    """The row of a ``model_type``; UnsupportedModel says what there is, or why this one cannot be served."""
    family = FAMILIES.get(str(model_type))
    if family is None:
        reason = _REFUSED.get(str(model_type))
        raise UnsupportedModel(
            f"model_type = {model_type!r} is not served" + (f": {reason}" if reason else " by this version"),
            hint=f"it serves {', '.join(sorted(FAMILIES))}",
        )
    return family


def _usual(
    package: str, name: str, head: Callable[[Any], HeadRule] = heads.llama_head, **differing: Any
) -> Family:
    """Class names as most families form them."""
    return Family(package, f"{name}DecoderLayer", f"{name}RotaryEmbedding", head, **differing)


def _no_windows(hf: Any) -> tuple[None, ...]:
    return (None,) * int(hf.num_hidden_layers)


def _one_window(hf: Any) -> tuple[int | None, ...]:
    return (hf.sliding_window,) * int(hf.num_hidden_layers)


def _smollm3_kind(hf: Any, index: int) -> str:
    kind = same_kind(hf, index)
    return kind if hf.no_rope_layers[index] else f"{kind}, no rope"


def _qwen_moe_kind(hf: Any, index: int) -> str:
    kind = same_kind(hf, index)
    is_sparse = hf.num_experts > 0 and (index + 1) % hf.decoder_sparse_step == 0
    return kind if is_sparse and index not in hf.mlp_only_layers else f"{kind}, dense"


def _dense_first_kind(hf: Any, index: int) -> str:
    kind = same_kind(hf, index)
    return kind if index >= hf.first_k_dense_replace else f"{kind}, dense"


def _listed_kind(hf: Any, index: int) -> str:
    kind = same_kind(hf, index)
    return kind if hf.mlp_layer_types[index] == "sparse" else f"{kind}, dense"


def _ernie_moe_kind(hf: Any, index: int) -> str:
    kind = same_kind(hf, index)
    is_within = hf.moe_layer_start_index <= index <= hf.moe_layer_end_index
    return kind if is_within and (index + 1) % hf.moe_layer_interval == 0 else f"{kind}, dense"


def _ungrouped(hf: Any) -> Mapping[str, Any]:
    return {"num_kv_heads": hf.num_attention_heads}


def _latent_facts(hf: Any) -> Mapping[str, Any]:
    # The cache holds what the latents unfold to: keys and values of every head, in the larger size of both.
    key_size = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    return {**_ungrouped(hf), "head_dim": max(key_size, hf.v_head_dim)}


def _gemma_facts(hf: Any) -> Mapping[str, Any]:
    if hf.use_bidirectional_attention:
        raise sees_ahead("use_bidirectional_attention", hf.use_bidirectional_attention)
    return {}


def _hunyuan_facts(hf: Any) -> Mapping[str, Any]:
    # What these call dynamic has fixed frequencies where alpha is given: no row's length matters.
    rope = dict(hf.rope_parameters)
    if rope["rope_type"] == "dynamic" and rope.get("alpha"):
        rope["rope_type"] = "ntk_alpha"
    return {"rope": rope}


def _phimoe_facts(hf: Any) -> Mapping[str, Any]:
    # transformers scales its angles by the length of the row, whatever their type; published models have longrope.
    rope_type = hf.rope_parameters["rope_type"]
    if rope_type not in ("default", "longrope"):
        raise UnsupportedModel(
            f"rope_parameters.rope_type = {rope_type!r}: default or longrope in this family"
        )
    return {}


def _bloom_facts(hf: Any) -> Mapping[str, Any]:
    # Linear biases have no end; this is the length that the models were trained with.
    return {**_ungrouped(hf), "max_positions": getattr(hf, "seq_length", None) or 2048}


def _falcon_facts(hf: Any) -> Mapping[str, Any]:
    shares_all = hf.multi_query and not hf.new_decoder_architecture
    facts: dict[str, Any] = {"num_kv_heads": 1 if shares_all else hf.num_kv_heads}
    return {**facts, "rope": {}} if hf.alibi else facts


def _adapt_bloom(layer: nn.Module, hf: Any, index: int) -> None:
    from petalsd.models.hf.bloom import BloomPagedAttention

    layer.self_attention = BloomPagedAttention(hf, index)


def _adapt_falcon(layer: nn.Module, hf: Any, index: int) -> None:
    from petalsd.models.hf.falcon import FalconPagedAttention

    layer.self_attention = FalconPagedAttention(hf, index)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "apertus": _usual("apertus", "Apertus", windows=_no_windows),
        "arcee": _usual("arcee", "Arcee", windows=_no_windows),
        "bloom": Family(
            "bloom", "BloomBlock", None, heads.bloom_head, _PETALS_PREFIXES, windows=_no_windows,
            facts=_bloom_facts, adapt=_adapt_bloom, plain_arguments=bloom_arguments,
        ),
        "cohere": _usual("cohere", "Cohere", heads.cohere_head, windows=_no_windows),
        "cohere2": _usual("cohere2", "Cohere2", heads.cohere_head),
        "cohere2_moe": _usual(
            "cohere2_moe", "Cohere2Moe", heads.cohere_moe_head, kind=_listed_kind, experts=ExpertNames()
        ),
        "cwm": _usual("cwm", "Cwm"),
        "deepseek_v3": _usual(
            "deepseek_v3", "DeepseekV3", windows=_no_windows, facts=_latent_facts, kind=_dense_first_kind,
            experts=ExpertNames(), quantized=(FP8,), float32=(_CORRECTION,),
        ),
        "dots1": _usual(
            "dots1", "Dots1", kind=_dense_first_kind, experts=ExpertNames(), float32=(_CORRECTION,)
        ),
        "ernie4_5": _usual("ernie4_5", "Ernie4_5", windows=_no_windows),
        "ernie4_5_moe": _usual(
            "ernie4_5_moe", "Ernie4_5_Moe", heads.ernie_moe_head, windows=_no_windows, kind=_ernie_moe_kind,
            experts=ExpertNames(), renames={"mlp.gate.moe_statics.": "mlp.moe_statics."},
            float32=("mlp.gate.weight", "mlp.gate.moe_statics.e_score_correction_bias"),
        ),
        "exaone4": _usual("exaone4", "Exaone4"),
        "exaone_moe": _usual(
            "exaone_moe", "ExaoneMoe", kind=_listed_kind, experts=ExpertNames(), float32=(_CORRECTION,),
            renames={_CORRECTION: "mlp.e_score_correction_bias"},
        ),
        "falcon": Family(
            "falcon", "FalconDecoderLayer", "FalconRotaryEmbedding", heads.falcon_head, _PETALS_PREFIXES,
            windows=_no_windows, facts=_falcon_facts, adapt=_adapt_falcon, plain_arguments=falcon_arguments,
        ),
        "flex_olmo": _usual("flex_olmo", "FlexOlmo", windows=_no_windows, experts=ExpertNames()),
        "gemma": _usual("gemma", "Gemma", heads.gemma_head, windows=_no_windows, facts=_gemma_facts),
        "gemma2": _usual("gemma2", "Gemma2", heads.gemma_head, facts=_gemma_facts),
        "gemma3_text": _usual("gemma3", "Gemma3", heads.gemma_head, facts=_gemma_facts),
        "glm": _usual("glm", "Glm", windows=_no_windows),
        "glm4": _usual("glm4", "Glm4", windows=_no_windows),
        "glm4_moe": _usual(
            "glm4_moe", "Glm4Moe", windows=_no_windows, kind=_dense_first_kind, experts=ExpertNames(),
            float32=(_CORRECTION,),
        ),
        "glm4_moe_lite": _usual(
            "glm4_moe_lite", "Glm4MoeLite", windows=_no_windows, facts=_latent_facts, kind=_listed_kind,
            experts=ExpertNames(), float32=(_CORRECTION,),
        ),
        "gpt_neox": Family(
            "gpt_neox", "GPTNeoXLayer", "GPTNeoXRotaryEmbedding", heads.gpt_neox_head, _NEOX_PREFIXES,
            windows=_no_windows, facts=_ungrouped,
        ),
        "gpt_oss": _usual("gpt_oss", "GptOss", experts=GptOssExpertNames(), quantized=(MXFP4,)),
        "granite": _usual("granite", "Granite", heads.granite_head, windows=_no_windows),
        "granitemoe": _usual(
            "granitemoe", "GraniteMoe", heads.granite_head, windows=_no_windows, experts=_GRANITE_EXPERTS,
            renames=_GRANITE_RENAMES,
        ),
        "granitemoeshared": _usual(
            "granitemoeshared", "GraniteMoeShared", heads.granite_head, windows=_no_windows,
            experts=_GRANITE_EXPERTS, renames=_GRANITE_RENAMES,
        ),
        "helium": _usual("helium", "Helium", windows=_no_windows),
        "hunyuan_v1_dense": _usual(
            "hunyuan_v1_dense", "HunYuanDenseV1", windows=_no_windows, facts=_hunyuan_facts
        ),
        "hunyuan_v1_moe": _usual(
            "hunyuan_v1_moe", "HunYuanMoEV1", windows=_no_windows, facts=_hunyuan_facts,
            experts=ExpertNames(router="mlp.gate.wg"), float32=("mlp.gate.wg.weight",),
        ),
        "hy_v3": _usual(
            "hy_v3", "HYV3", windows=_no_windows, kind=_listed_kind, experts=ExpertNames(),
            renames={
                "mlp.gate.": "mlp.router.gate.",
                "mlp.shared_experts.": "mlp.shared_mlp.",
                "mlp.e_score_correction_bias": "mlp.expert_bias",
            },
            float32=("mlp.e_score_correction_bias",),
        ),
        "hyperclovax": _usual("hyperclovax", "HyperCLOVAX", heads.hyperclovax_head, windows=_no_windows),
        "jais2": _usual("jais2", "Jais2", heads.jais2_head, windows=_no_windows),
        "llama": _usual("llama", "Llama", windows=_no_windows),
        "mellum": _usual("mellum", "Mellum", kind=_listed_kind, experts=ExpertNames()),
        "minicpm3": _usual(
            "minicpm3", "MiniCPM3", heads.minicpm3_head, windows=_no_windows, facts=_latent_facts
        ),
        "minimax_m2": _usual(
            "minimax_m2", "MiniMaxM2", windows=_no_windows, renames={"mlp.": "block_sparse_moe."},
            experts=ExpertNames(in_files="block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
            quantized=(FP8,), float32=("mlp.e_score_correction_bias",),
        ),
        "ministral": _usual("ministral", "Ministral"),
        "ministral3": _usual("ministral3", "Ministral3", windows=_one_window),
        "mistral": _usual("mistral", "Mistral", windows=_one_window),
        "mixtral": _usual(
            "mixtral", "Mixtral", windows=_one_window, renames={"mlp.gate.": "block_sparse_moe.gate."},
            experts=ExpertNames(in_files="block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
        ),
        "olmo": _usual("olmo", "Olmo", heads.olmo_head, windows=_no_windows),
        "olmo2": _usual("olmo2", "Olmo2", windows=_no_windows),
        "olmo3": _usual("olmo3", "Olmo3"),
        "olmoe": _usual("olmoe", "Olmoe", windows=_no_windows, experts=ExpertNames()),
        "opt": Family(
            "opt", "OPTDecoderLayer", None, heads.opt_head, _OPT_PREFIXES, windows=_no_windows, facts=_ungrouped
        ),
        "phi": _usual("phi", "Phi", heads.phi_head, windows=_no_windows),
        "phi3": _usual("phi3", "Phi3", windows=_one_window),
        "phimoe": _usual(
            "phimoe", "Phimoe", heads.phimoe_head, windows=_one_window, facts=_phimoe_facts,
            renames={"mlp.router.": "block_sparse_moe.gate."},
            experts=ExpertNames(
                in_files="block_sparse_moe.experts", gate="w1", up="w3", down="w2", router="mlp.router"
            ),
        ),
        "qwen2": _usual("qwen2", "Qwen2"),
        "qwen2_moe": _usual("qwen2_moe", "Qwen2Moe", kind=_qwen_moe_kind, experts=ExpertNames()),
        "qwen3": _usual("qwen3", "Qwen3"),
        "qwen3_moe": _usual(
            "qwen3_moe", "Qwen3Moe", windows=_one_window, kind=_qwen_moe_kind, experts=ExpertNames(),
            quantized=(FP8,),
        ),
        "seed_oss": _usual("seed_oss", "SeedOss", windows=_no_windows),
        "smollm3": _usual("smollm3", "SmolLM3", kind=_smollm3_kind),
        "solar_open": _usual(
            "solar_open", "SolarOpen", windows=_no_windows, experts=ExpertNames(), float32=(_CORRECTION,)
        ),
        "starcoder2": _usual("starcoder2", "Starcoder2", heads.starcoder2_head, windows=_one_window),
        "vaultgemma": _usual("vaultgemma", "VaultGemma", heads.gemma_head),
        "youtu": _usual("youtu", "Youtu", windows=_no_windows, facts=_latent_facts),
    }
)  # fmt: skip

_COMPLEX = "its rotary angles are complex numbers, which this version does not lay out for its kernels"
_IN_IMAGES = "transformers has it as a part of a model of text and images alone"
_TWICE = "its layers attend twice, and a block has one cache"
_RECURRENT = (
    "some of its layers carry a recurrent state from token to token, which cannot be paged or rolled back"
)
_SHARED = "its layers read keys and values, or inputs, of other layers, which may be on another server"
_CLOSED = "its decoder layer hands nothing on to its attention, which the paged cache needs"
_CHUNKED = "its attention sees chunks of positions, which the paged cache does not know"
_DIFFERENTIAL = "its attention is the difference of two softmaxes, which no kernel here computes"
_UNEVEN = "its heads differ in number from layer to layer, and the cache has one shape for all"
_INDEXED = "its attention chooses keys by an index of its own, which the paged cache does not hold"
_THREE_AXES = "it is a model of text and images, whose rotary positions have three axes"

_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_v2": _COMPLEX,
        "longcat_flash": _TWICE,
        "mistral4": _IN_IMAGES,
        **dict.fromkeys(
            ("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear",
             "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5",
             "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "zamba",
             "zamba2"),
            _RECURRENT,
        ),
        **dict.fromkeys(("deepseek_v32", "deepseek_v4", "glm_moe_dsa"), _INDEXED),
        **dict.fromkeys(("laguna", "mimo_v2_flash"), _UNEVEN),
        **dict.fromkeys(("llama4", "llama4_text"), _CHUNKED),
        **dict.fromkeys(("nemotron", "stablelm"), _CLOSED),
        "diffllama": _DIFFERENTIAL,
        **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), _SHARED),
        **dict.fromkeys(("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe"), _THREE_AXES),
    }
)  # fmt: skip
