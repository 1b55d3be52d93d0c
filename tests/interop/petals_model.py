"""A copy of a model directory that Petals 2.2 can read: old-style config, linked weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What transformers 4.34 has no word for and would silently compute without.
_MUST_BE_FALSE = ("mlp_bias", "attention_bias")
_OLD_ROPE_TYPES = ("linear", "dynamic")


def make_petals_copy(model: Path, target: Path) -> Path:
    """Link the files of ``model`` into ``target`` beside a config.json in the old style; return ``target``.

    Raises ValueError when the old libraries would compute something else from this model.
    """
    target.mkdir(parents=True, exist_ok=True)
    for source in model.iterdir():
        link = target / source.name
        if source.name != "config.json" and not link.is_symlink():
            link.symlink_to(source.resolve())
    config = old_style_config(json.loads((model / "config.json").read_text()))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def old_style_config(config: dict[str, Any]) -> dict[str, Any]:
    """Add ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` as transformers 4 spelled them."""
    if config["model_type"] in ("bloom", "falcon"):  # spelled as they were
        return {**config, "torch_dtype": config.get("dtype", config.get("torch_dtype"))}
    if config["model_type"] != "llama":
        raise ValueError(f"model_type = {config['model_type']!r}: Petals 2.2 serves bloom, falcon and llama")
    for key in _MUST_BE_FALSE:
        if config.get(key):
            raise ValueError(f"{key} = {config[key]!r}: Petals 2.2 would leave the biases out")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, head_dim):
        raise ValueError(f"head_dim = {config['head_dim']}: Petals 2.2 computes {head_dim}")
    rope = config.get("rope_parameters") or {}
    return {
        **config,
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "rope_scaling": _old_rope_scaling(rope) if rope else config.get("rope_scaling"),
        "torch_dtype": config.get("dtype", config.get("torch_dtype")),
    }


def _old_rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in _OLD_ROPE_TYPES:
        raise ValueError(f"rope_type = {kind!r}: Petals 2.2 knows only {', '.join(_OLD_ROPE_TYPES)}")
    return {"type": kind, "factor": float(rope["factor"])}
