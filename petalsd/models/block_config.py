"""The configurations of the fused families in one normal form: what ``TransformerBlock`` needs to know.

They differ only in what they spell out: Llama has optional biases, Mistral a sliding window on every block,
Qwen2 biases on q, k, v and windows on some blocks, Qwen3 norms on the heads of q and k. ``from_hf`` refuses what
the fused block would compute differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from petalsd.errors import ModelError, UnsupportedModel
from petalsd.models.model_config import (
    ModelConfig,
    check_sizes,
    common_facts,
    read_hf_config,
    windows_by_layer,
)

ACTIVATIONS = frozenset({"silu", "swish", "gelu", "gelu_pytorch_tanh", "relu"})


@dataclass(frozen=True, slots=True)
class BlockConfig(ModelConfig):
    """The facts of one model of a fused family."""

    intermediate_size: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> BlockConfig:
        """Read a ``config.json``. UnsupportedModel: outside the fused blocks; ModelError: makes no sense."""
        model_type = raw.get("model_type")
        family = FUSED_FAMILIES.get(str(model_type))
        if family is None:
            raise UnsupportedModel(
                f"model_type = {model_type!r} has no fused block",
                hint=f"these have: {', '.join(sorted(FUSED_FAMILIES))}",
            )
        hf = read_hf_config(str(model_type), raw)
        config = cls(
            **common_facts(hf, raw),
            intermediate_size=hf.intermediate_size,
            norm_eps=hf.rms_norm_eps,
            activation=hf.hidden_act,
            **family(hf),
        )
        check_sizes(config, "intermediate_size")
        _check_activation(config)
        _check_rope(config)
        return config


def _llama(hf: Any) -> dict[str, Any]:
    return _details(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)


def _mistral(hf: Any) -> dict[str, Any]:
    return _details(hf, windows=(hf.sliding_window,) * hf.num_hidden_layers)


def _qwen2(hf: Any) -> dict[str, Any]:
    return _details(hf, qkv_bias=True, windows=windows_by_layer(hf))


def _qwen3(hf: Any) -> dict[str, Any]:
    bias = hf.attention_bias
    return _details(hf, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=windows_by_layer(hf))


FUSED_FAMILIES: Mapping[str, Callable[[Any], dict[str, Any]]] = MappingProxyType(
    {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}
)


def _details(hf: Any, **differing: Any) -> dict[str, Any]:
    """What families differ in, with the plainest choice as default."""
    plain = {"qkv_bias": False, "output_bias": False, "mlp_bias": False, "qk_norm": False}
    return {**plain, "windows": (None,) * hf.num_hidden_layers, **differing}


def _check_activation(config: BlockConfig) -> None:
    if config.activation not in ACTIVATIONS:
        raise UnsupportedModel(f"hidden_act = {config.activation!r}: one of {', '.join(sorted(ACTIVATIONS))}")


def _check_rope(config: BlockConfig) -> None:
    rope_type = config.rope.get("rope_type")
    if rope_type != "default" and (not isinstance(rope_type, str) or rope_type not in ROPE_INIT_FUNCTIONS):
        known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
        raise UnsupportedModel(f"rope_parameters.rope_type = {rope_type!r}: one of {known}")
    if rope_type != "proportional" and config.rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("partial_rotary_factor other than 1 is not computed by these families")
    if config.head_dim % 2:
        raise ModelError(f"head_dim = {config.head_dim}: rotary embeddings need an even head size")
