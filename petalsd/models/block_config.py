"""One normal form for the configurations of all families: what a block needs to know, and nothing else.

Families differ only in what they spell out: Llama has optional biases, Mistral a sliding window on every block,
Qwen2 biases on q, k, v and windows on some blocks, Qwen3 norms on the heads of q and k. transformers' own config
classes fill in defaults and old spellings; ``from_hf`` refuses what the blocks here would compute differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from petalsd.errors import ConfigError, ModelError, UnsupportedModel

ACTIVATIONS = frozenset({"silu", "swish", "gelu", "gelu_pytorch_tanh", "relu"})

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
)


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """The facts of one model. ``windows[b]`` is block b's sliding window in tokens, None for full attention.

    ``rope`` is transformers' ``rope_parameters``: ``rope_type``, ``rope_theta`` and what the type needs.
    ``dtype`` is the checkpoint's own, None if its config does not say.
    """

    model_type: str
    num_blocks: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: Mapping[str, Any]
    vocab_size: int
    max_positions: int
    tie_word_embeddings: bool
    dtype: torch.dtype | None

    @property
    def kv_groups(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> BlockConfig:
        """Read a ``config.json``. UnsupportedModel: outside the blocks here; ModelError: makes no sense."""
        model_type = raw.get("model_type")
        family = _FAMILIES.get(str(model_type))
        if family is None:
            raise UnsupportedModel(
                f"model_type = {model_type!r} is not served by this version",
                hint=f"it serves {', '.join(sorted(_FAMILIES))}",
            )
        _refuse_quantized(raw)
        hf = _read_with_transformers(str(model_type), raw)
        num_heads = hf.num_attention_heads
        config = cls(
            model_type=str(model_type),
            num_blocks=hf.num_hidden_layers,
            hidden_size=hf.hidden_size,
            num_heads=num_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // max(num_heads, 1),
            intermediate_size=hf.intermediate_size,
            norm_eps=hf.rms_norm_eps,
            activation=hf.hidden_act,
            rope=MappingProxyType(dict(hf.rope_parameters)),
            vocab_size=hf.vocab_size,
            max_positions=hf.max_position_embeddings,
            tie_word_embeddings=hf.tie_word_embeddings,
            dtype=_read_dtype(raw),
            **family(hf),
        )
        _check_sizes(config)
        _check_rope(config)
        return config


def dtype_for(setting: str, config: BlockConfig, device: torch.device) -> torch.dtype:
    """The dtype to serve in. ``auto``: the checkpoint's, but bfloat16 if that is float32 or not given.

    Raises ConfigError for an unknown setting and for float16 on a CPU, which cannot compute in it.
    """
    if setting == "auto":
        given = config.dtype
        dtype = torch.bfloat16 if given is None or given == torch.float32 else given
        hint = "set model.dtype to bfloat16 or float32"
    elif setting in DTYPES:
        dtype, hint = DTYPES[setting], "use bfloat16 or float32"
    else:
        raise ConfigError(f"model.dtype = {setting!r}", hint=f"one of auto, {', '.join(DTYPES)}")
    if dtype == torch.float16 and device.type == "cpu":
        raise ConfigError(f"model.dtype = {setting!r} means float16, which a CPU does not serve", hint=hint)
    return dtype


def _llama(hf: Any) -> dict[str, Any]:
    return _details(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)


def _mistral(hf: Any) -> dict[str, Any]:
    return _details(hf, windows=(hf.sliding_window,) * hf.num_hidden_layers)


def _qwen2(hf: Any) -> dict[str, Any]:
    return _details(hf, qkv_bias=True, windows=_windows_by_layer(hf))


def _qwen3(hf: Any) -> dict[str, Any]:
    bias = hf.attention_bias
    return _details(hf, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=_windows_by_layer(hf))


_FAMILIES: Mapping[str, Callable[[Any], dict[str, Any]]] = MappingProxyType(
    {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}
)


def _details(hf: Any, **differing: Any) -> dict[str, Any]:
    """What families differ in, with the plainest choice as default."""
    plain = {"qkv_bias": False, "output_bias": False, "mlp_bias": False, "qk_norm": False}
    return {**plain, "windows": (None,) * hf.num_hidden_layers, **differing}


def _windows_by_layer(hf: Any) -> tuple[int | None, ...]:
    layer_types = list(hf.layer_types)
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown or len(layer_types) != hf.num_hidden_layers:
        raise UnsupportedModel(
            f"layer_types = {layer_types}: one full_attention or sliding_attention per block"
        )
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in layer_types)


def _refuse_quantized(raw: Mapping[str, Any]) -> None:
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModel(
            f"quantization_config.quant_method = {method!r}: quantized checkpoints are not read",
            hint="use the checkpoint that it was made from",
        )


def _read_with_transformers(model_type: str, raw: Mapping[str, Any]) -> Any:
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(raw))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ModelError(
            f"config.json is not a valid {model_type} configuration: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None:
        return None
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UnsupportedModel(f"dtype = {name!r} in config.json: one of {', '.join(DTYPES)} is served")
    return dtype


def _check_sizes(config: BlockConfig) -> None:
    sizes = (
        "num_blocks",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    )
    for name in sizes:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{name} = {value!r} in config.json: a positive integer is needed")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"num_attention_heads = {config.num_heads} is not a multiple of "
            f"num_key_value_heads = {config.num_kv_heads}"
        )
    if config.activation not in ACTIVATIONS:
        raise UnsupportedModel(f"hidden_act = {config.activation!r}: one of {', '.join(sorted(ACTIVATIONS))}")
    for window in config.windows:
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ModelError(f"sliding_window = {window!r} in config.json: a positive integer or null")


def _check_rope(config: BlockConfig) -> None:
    rope_type = config.rope.get("rope_type")
    if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *sorted(ROPE_INIT_FUNCTIONS)])
        raise UnsupportedModel(f"rope_parameters.rope_type = {rope_type!r}: one of {known}")
    if rope_type != "proportional" and config.rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("partial_rotary_factor other than 1 is not computed by these families")
    if config.head_dim % 2:
        raise ModelError(f"head_dim = {config.head_dim}: rotary embeddings need an even head size")
