"""In which order and precision the keys and values of a model are kept."""

from __future__ import annotations

import torch

from petalsd.kvcache.sizing import KVGeometry
from petalsd.models.block_config import BlockConfig
from petalsd.models.model_config import ModelConfig
from petalsd.ops.head_major import STRIP_TOKENS

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def cache_geometry(
    config: ModelConfig, page_tokens: int, dtype: torch.dtype, device: torch.device, is_int8: bool = False
) -> KVGeometry:
    """Pages for blocks that compute in ``dtype``: in the order of the CPU's kernels where these may read them.

    ``is_int8`` asks for 8 bits an element. ValueError where such pages are not served.
    """
    can_be_head_major = device.type == "cpu" and dtype in _NATIVE_DTYPES and page_tokens % STRIP_TOKENS == 0
    if is_int8 and device.type == "cpu" and not can_be_head_major:
        raise ValueError(f"no int8 pages of {page_tokens} tokens for {dtype} on {device}")
    return KVGeometry(
        page_tokens,
        config.num_kv_heads,
        config.head_dim,
        1 if is_int8 else dtype.itemsize,
        # Other families are computed by torch, which takes a token's heads together.
        is_head_major=can_be_head_major and (is_int8 or isinstance(config, BlockConfig)),
    )
