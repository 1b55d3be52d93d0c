"""In which order and precision the keys and values of a model are kept."""

from __future__ import annotations

import torch

from petalsd.kvcache.sizing import KVGeometry
from petalsd.models.block_config import BlockConfig
from petalsd.models.model_config import ModelConfig
from petalsd.ops.eight_bit_kv import EIGHT_BIT_KV, FLOAT8, check_float8
from petalsd.ops.head_major import STRIP_TOKENS

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


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
    can_be_head_major = device.type == "cpu" and dtype in _NATIVE_DTYPES and page_tokens % STRIP_TOKENS == 0
    if stored == FLOAT8:
        check_float8(device)
    elif is_eight_bit and device.type == "cpu" and not can_be_head_major:
        raise ValueError(f"no int8 pages of {page_tokens} tokens for {dtype} on {device}")
    return KVGeometry(
        page_tokens,
        config.num_kv_heads,
        config.head_dim,
        stored,
        # Other families are computed by torch, which takes a token's heads together.
        is_head_major=can_be_head_major and (is_eight_bit or isinstance(config, BlockConfig)),
    )
