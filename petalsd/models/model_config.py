"""What is known of a model whatever its family: enough for naming it, sizing its cache and speaking to a swarm.

transformers' own config classes fill in defaults and old spellings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers.utils.type_validators  # noqa: F401 - the first config would import it, in the middle of a start
from transformers import CONFIG_MAPPING

from petalsd.errors import ConfigError, ModelError, UnsupportedModel, shortened

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
)

MAX_POSITIONS = (1 << 31) - 1
"""Positions are numbers of 32 bits to kernels."""

# Far above any model: what is larger is an error, and would be met with lists or tensors of that length.
_MAX_BLOCKS = 10_000
_MAX_EXPERTS = 10_000
_MAX_SIZE = 1 << 24


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The facts that all families have.

    windows  ``windows[b]`` is block b's sliding window in tokens, None for full attention
    rope     transformers' ``rope_parameters``: ``rope_type``, ``rope_theta`` and what the type needs, one such
             mapping per layer type where those differ; empty where positions enter in another way
    dtype    the checkpoint's own, None if its config does not say
    """

    model_type: str
    num_blocks: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
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


_WRAPPERS = frozenset(("gemma3", "mistral3"))
# What repositories with code of their own call a family that transformers has.
_ALIASES = {"kimi_k2": "deepseek_v3"}
_OF_WHOLE = ("dtype", "torch_dtype", "quantization_config")


def dtype_for(setting: str, config: ModelConfig, device: torch.device) -> torch.dtype:
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


def read_hf_config(model_type: str, raw: Mapping[str, Any], quantized: Collection[str] = ()) -> Any:
    """transformers' config object for a ``config.json``.

    quantized  values of ``quant_method`` that are read

    UnsupportedModel for another quantized checkpoint, layers with options of their own, or attention that is not
    causal; ModelError when the content makes no sense.
    """
    _refuse_quantized(raw, quantized)
    _refuse_uneven(raw)
    _check_finite(raw)
    config_class = CONFIG_MAPPING[model_type]
    # Before transformers makes lists of that length.
    for key in ("num_hidden_layers", config_class.attribute_map.get("num_hidden_layers", "")):
        _check_limit(key, raw.get(key), _MAX_BLOCKS)
    try:
        # A copy: these classes write into the mapping of the rotary embedding.
        hf = config_class.from_dict(copy.deepcopy(dict(raw)))
        if getattr(hf, "rope_parameters", None):
            # Once more, as the models do: an original length beside the mapping is not seen the first time.
            hf.standardize_rope_params()
    except Exception as error:  # each family's class has its own way to be surprised
        raise ModelError(
            f"config.json is not a valid {model_type} configuration: {_one_line(error)}"
        ) from error
    if not getattr(hf, "is_causal", True):  # masks of every family heed it
        raise sees_ahead("is_causal", hf.is_causal)
    for key, value in vars(hf).items():
        if "experts" in key:
            _check_limit(key, value, _MAX_EXPERTS)
        elif key.endswith("_size"):
            _check_limit(key, value, _MAX_SIZE)
    return hf


def sees_ahead(key: str, value: object) -> UnsupportedModel:
    """For a key of ``config.json`` that lets tokens see those after them."""
    return UnsupportedModel(
        f"{key} = {shortened(value)}: tokens that see those after them have no cache, and generate nothing"
    )


def text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ``config.json`` of a text model, or that part of one of text and images. ModelError when it is none.

    The family goes by transformers' name of it.
    """
    model_type = str(raw.get("model_type"))
    if model_type in _ALIASES:
        return {**raw, "model_type": _ALIASES[model_type]}
    if model_type not in _WRAPPERS:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelError(f"text_config = {text!r} in config.json: a mapping is needed")
    # Whether the embeddings are tied is seen in the files: what the whole says may not be what the part does.
    whole = {key: raw[key] for key in _OF_WHOLE if raw.get(key) is not None}
    return {**whole, **text, "tie_word_embeddings": True}


def read_dtype(raw: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a ``config.json`` names; UnsupportedModel for one that is not served."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None:
        return None
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UnsupportedModel(f"dtype = {name!r} in config.json: one of {', '.join(DTYPES)} is served")
    return dtype


def common_facts(hf: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig but ``windows``, by the names that most of transformers' configs use."""
    num_heads = hf.num_attention_heads
    kv_heads = getattr(hf, "num_key_value_heads", None)
    return {
        "model_type": str(raw.get("model_type")),
        "num_blocks": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_heads if kv_heads is None else kv_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // max(num_heads, 1),
        "rope": MappingProxyType(dict(getattr(hf, "rope_parameters", None) or {})),
        "vocab_size": hf.vocab_size,
        "max_positions": getattr(hf, "max_position_embeddings", None),
        "tie_word_embeddings": bool(hf.tie_word_embeddings),
        "dtype": read_dtype(raw),
    }


def windows_by_layer(hf: Any) -> tuple[int | None, ...]:
    """Each block's window by ``layer_types``.

    UnsupportedModel for layers that are no softmax attention, ModelError for sliding ones without a window.
    """
    layer_types = list(hf.layer_types)
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown or len(layer_types) != hf.num_hidden_layers:
        raise UnsupportedModel(
            f"layer_types = {shortened(layer_types)}: one full_attention or sliding_attention per block"
        )
    if hf.sliding_window is None and "sliding_attention" in layer_types:
        raise ModelError("layer_types in config.json has sliding_attention, but sliding_window has no value")
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in layer_types)


def check_sizes(config: ModelConfig, *more: str) -> None:
    """ModelError unless the counts, and the fields named ``more``, are positive and the heads divide."""
    counts = (
        "num_blocks",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
        "max_positions",
    )
    for name in (*counts, *more):
        value = getattr(config, name)
        check_count(name, value, MAX_POSITIONS if name == "max_positions" else _MAX_SIZE)
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"num_attention_heads = {config.num_heads} is not a multiple of "
            f"num_key_value_heads = {config.num_kv_heads} in config.json"
        )
    for window in config.windows:
        if window is not None:
            check_count("sliding_window", window, MAX_POSITIONS)


def check_count(key: str, value: object, limit: int) -> None:
    """ModelError, which names the key, unless this is an integer from 1 to ``limit``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{key} = {shortened(value)} in config.json: a positive integer is needed")
    _check_limit(key, value, limit)


def _check_limit(key: str, value: object, limit: int) -> None:
    if isinstance(value, int) and value > limit:
        raise ModelError(f"{key} = {shortened(value)} in config.json: more than {limit} cannot be meant")


def _check_finite(raw: Mapping[str, Any]) -> None:
    """ModelError for NaN and infinity, which Python reads though JSON has no word for them."""
    pending: list[tuple[str, Any]] = list(raw.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, Mapping):
            pending.extend((f"{key}.{inner}", one) for inner, one in value.items())
        elif isinstance(value, list):
            pending.extend((key, one) for one in value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{key} = {value} in config.json: a finite number is needed")


def _refuse_quantized(raw: Mapping[str, Any], quantized: Collection[str]) -> None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method not in quantized:
        raise UnsupportedModel(
            f"quantization_config.quant_method = {method!r}: quantized checkpoints are not read",
            hint="use the checkpoint that it was made from",
        )


def _refuse_uneven(raw: Mapping[str, Any]) -> None:
    per_layer = raw.get("per_layer_config")
    if per_layer:
        raise UnsupportedModel(
            f"per_layer_config = {shortened(per_layer)}: layers with options of their own are not served"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
