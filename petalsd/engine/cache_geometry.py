"""In which order and precision the keys and values of a model are kept."""

from __future__ import annotations

import torch

from petalsd.kvcache.sizing import KVGeometry
from petalsd.models.model_config import ModelConfig
from petalsd.ops.eight_bit_kv import EIGHT_BIT_KV, FLOAT8, check_float8
from petalsd.ops.head_major import STRIP_TOKENS
from petalsd.ops.native_attention import has_native_order


def cache_geometry(
    config: ModelConfig,
    page_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    stored: torch.dtype | None = None,
) -> KVGeometry:
    """Pages for blocks that compute in ``dtype``: in the order of the CPU's kernels where these may read them.

    ``stored`` is int8, float8_e4m3fn or ``dtype``; None: ``dtype``. ValueError where such pages are not served.
    """
    stored = stored or dtype
    is_eight_bit = stored in EIGHT_BIT_KV
    is_native = has_native_order(config.head_dim, dtype) and page_tokens % STRIP_TOKENS == 0
    is_head_major = is_native and device.type == "cpu"
    if stored == FLOAT8:
        check_float8(device)
    elif is_eight_bit and device.type == "cpu" and not is_head_major:
        raise ValueError(f"no int8 pages of {page_tokens} tokens for {dtype} on {device}")
    return KVGeometry(
        page_tokens,
        config.num_kv_heads,
        config.head_dim,
        stored,
        is_head_major,
    )
