"""Attention with linear biases in BLOOM and Falcon: our form of it, and transformers' for comparison."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from petalsd.ops.score_rule import Alibi, ScoreRule


def bloom_rule(num_heads: int, device: torch.device) -> ScoreRule:
    """Biases are added to the scaled scores."""
    return ScoreRule(alibi=Alibi(alibi_slopes(num_heads).to(device)))


def falcon_rule(num_heads: int, scale: float, device: torch.device) -> ScoreRule:
    """Biases are rounded to bfloat16, as in training, and scaled as the scores are."""
    return ScoreRule(alibi=Alibi(alibi_slopes(num_heads).to(device, torch.bfloat16), scale))


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Float32 ``[H]`` on the CPU: powers of ``2^(-8/n)`` for the power of two n up to H, then in between."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / power) for head in range(num_heads - power)]
    return torch.tensor(slopes, device="cpu")


def bloom_arguments(hf: Any, num_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """What an unchanged BLOOM layer needs beside the mask."""
    return {"alibi": _transformers_alibi("bloom", hf.n_head, num_tokens, dtype)}


def falcon_arguments(hf: Any, num_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """What an unchanged Falcon layer needs beside mask and angles."""
    alibi = _transformers_alibi("falcon", hf.num_attention_heads, num_tokens, dtype) if hf.alibi else None
    return {"alibi": alibi}


def _transformers_alibi(package: str, num_heads: int, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    biases: torch.Tensor = module.build_alibi_tensor(
        torch.ones(1, num_tokens, dtype=torch.long), num_heads, dtype
    )
    return biases
