"""What stands around the blocks of each family, from transformers' config of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from petalsd.errors import UnsupportedModel
from petalsd.models.head_rule import HeadNames, HeadRule

_PETALS_BASES = ("transformer.", "")
_OLMO_EPS = 1e-5
_OPT_EPS = 1e-5  # torch's own default
_OPT_FIRST_POSITION = 2  # the table keeps two rows from the days of its padding


def llama_head(hf: Any) -> HeadRule:
    return HeadRule(norm_eps=hf.rms_norm_eps)


def gemma_head(hf: Any) -> HeadRule:
    return HeadRule(
        embedding_scale=hf.hidden_size**0.5,
        norm_eps=hf.rms_norm_eps,
        norm_offset=1.0,
        logit_softcap=getattr(hf, "final_logit_softcapping", None),
    )


def granite_head(hf: Any) -> HeadRule:
    return HeadRule(
        input_scale=hf.embedding_multiplier, norm_eps=hf.rms_norm_eps, logit_scale=1 / hf.logits_scaling
    )


def hyperclovax_head(hf: Any) -> HeadRule:
    """Granite's, but logits are multiplied."""
    return replace(granite_head(hf), logit_scale=hf.logits_scaling)


def minicpm3_head(hf: Any) -> HeadRule:
    return HeadRule(
        embedding_scale=hf.scale_emb, norm_eps=hf.rms_norm_eps, logit_scale=hf.dim_model_base / hf.hidden_size
    )


def bloom_head(hf: Any) -> HeadRule:
    names = HeadNames(
        prefixes=_PETALS_BASES,
        embeddings="word_embeddings.weight",
        embedding_norm="word_embeddings_layernorm.weight",
        embedding_norm_bias="word_embeddings_layernorm.bias",
        norm="ln_f.weight",
        norm_bias="ln_f.bias",
    )
    return HeadRule(names, norm="layer", norm_eps=hf.layer_norm_epsilon)


def ernie_moe_head(hf: Any) -> HeadRule:
    return HeadRule(HeadNames(output_bias="lm_head.bias" if hf.use_bias else None), norm_eps=hf.rms_norm_eps)


def falcon_head(hf: Any) -> HeadRule:
    names = HeadNames(
        prefixes=_PETALS_BASES,
        embeddings="word_embeddings.weight",
        norm="ln_f.weight",
        norm_bias="ln_f.bias",
    )
    return HeadRule(names, norm="layer", norm_eps=hf.layer_norm_epsilon)


def cohere_head(hf: Any) -> HeadRule:
    return HeadRule(norm="layer", norm_eps=hf.layer_norm_eps, logit_scale=hf.logit_scale)


def cohere_moe_head(hf: Any) -> HeadRule:
    """Cohere's, but for the norm of models that name an epsilon for theirs."""
    rule = cohere_head(hf)
    return rule if hf.rms_norm_eps is None else replace(rule, norm="rms", norm_eps=hf.rms_norm_eps)


def gpt_neox_head(hf: Any) -> HeadRule:
    names = HeadNames(
        prefixes=("gpt_neox.", ""),
        embeddings="embed_in.weight",
        norm="final_layer_norm.weight",
        norm_bias="final_layer_norm.bias",
        output="embed_out.weight",
    )
    return HeadRule(names, norm="layer", norm_eps=hf.layer_norm_eps)


def jais2_head(hf: Any) -> HeadRule:
    return HeadRule(HeadNames(norm_bias="norm.bias"), norm="layer", norm_eps=hf.layer_norm_eps)


def olmo_head(hf: Any) -> HeadRule:
    return HeadRule(HeadNames(norm=None), norm="layer", norm_eps=_OLMO_EPS)


def opt_head(hf: Any) -> HeadRule:
    """UnsupportedModel for embeddings that are narrower than the blocks."""
    if hf.word_embed_proj_dim != hf.hidden_size:
        raise UnsupportedModel(
            f"word_embed_proj_dim = {hf.word_embed_proj_dim}: this client has embeddings of the blocks' width, "
            f"{hf.hidden_size}, only",
            hint="its blocks are served all the same",
        )
    has_norm = hf.do_layer_norm_before and not hf._remove_final_layer_norm
    has_weight = has_norm and hf.layer_norm_elementwise_affine
    names = HeadNames(
        prefixes=("model.decoder.", "decoder."),
        positions="embed_positions.weight",
        norm="final_layer_norm.weight" if has_weight else None,
        norm_bias="final_layer_norm.bias" if has_weight else None,
    )
    return HeadRule(
        names,
        first_position=_OPT_FIRST_POSITION,
        norm="layer" if has_norm else "none",
        norm_eps=_OPT_EPS,
    )


def phi_head(hf: Any) -> HeadRule:
    names = HeadNames(
        norm="final_layernorm.weight", norm_bias="final_layernorm.bias", output_bias="lm_head.bias"
    )
    return HeadRule(names, norm="layer", norm_eps=hf.layer_norm_eps)


def phimoe_head(hf: Any) -> HeadRule:
    names = HeadNames(norm_bias="norm.bias", output_bias="lm_head.bias" if hf.lm_head_bias else None)
    return HeadRule(names, norm="layer", norm_eps=hf.rms_norm_eps)


def starcoder2_head(hf: Any) -> HeadRule:
    return HeadRule(HeadNames(norm_bias="norm.bias"), norm="layer", norm_eps=hf.norm_epsilon)
