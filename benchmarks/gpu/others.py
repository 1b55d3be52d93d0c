"""Others' blocks of the same shape: transformers' layer in this process, stock Petals' in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.gpu.cards import Shape
from benchmarks.gpu.case import Site
from benchmarks.timing import Work
from tests.interop import stock

PETALS_SIDE = Path(__file__).resolve().parent / "petals_side.py"
_PETALS_DEADLINE_S = 300.0


def transformers_step(site: Site, shape: Shape, num_rows: int, context: int) -> Work:
    """A decode step through transformers' layer, as its models run it; each starts from the same cache."""
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, num_hidden_layers=1,
        max_position_embeddings=131072, vocab_size=8,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.device(site.device):
        layer: Any = LlamaDecoderLayer(config, 0).to(site.dtype).eval().requires_grad_(False)
        rotary = LlamaRotaryEmbedding(config)
    cache = DynamicCache(config=config)
    past = (num_rows, shape.num_kv_heads, context - 1, shape.head_dim)
    cache.update(site.randn(*past), site.randn(*past), 0)
    hidden = site.randn(num_rows, 1, shape.hidden)
    positions = torch.full((num_rows, 1), context - 1, device=site.device)
    angles = rotary(hidden, positions)

    @torch.inference_mode()
    def work() -> torch.Tensor:
        output = layer(hidden, position_ids=positions, past_key_values=cache, position_embeddings=angles)
        cache.crop(-1)
        return output[0] if isinstance(output, tuple) else output

    return work


def petals_seconds(site: Site, shape: Shape, batches: Sequence[int], context: int) -> list[list[float]]:
    """Of each decode step through stock Petals' block, for each number of rows.

    RuntimeError says why there are none.
    """
    if not stock.is_built():
        raise RuntimeError("stock Petals' environment is not there: make test-interop builds it")
    job = {
        "shape": asdict(shape), "rows": list(batches), "context": context, "samples": site.samples,
        "device": str(site.device), "dtype": str(site.dtype).removeprefix("torch."),
    }  # fmt: skip
    done = subprocess.run(
        [str(stock.PYTHON), str(PETALS_SIDE), json.dumps(job)],
        capture_output=True, text=True, timeout=_PETALS_DEADLINE_S, env={**os.environ, **stock.ENVIRONMENT},
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return [[float(seconds) for seconds in steps] for steps in json.loads(done.stdout.splitlines()[-1])]
