"""In which order and precision keys and values are kept, by device."""

from __future__ import annotations

import pytest
import torch

from petalsd.engine.cache_geometry import cache_geometry
from petalsd.kvcache.pool import KVPool
from petalsd.models.block_config import BlockConfig
from petalsd.ops.eight_bit_kv import Int8KV
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.ragged import PagedKV

LLAMA = BlockConfig.from_hf(
    {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 128, "torch_dtype": "float32",
    }
)  # fmt: skip
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "is_int8", "kind"),
    [(CPU, False, HeadMajorKV), (CPU, True, HeadMajorKV), (CUDA, False, PagedKV), (CUDA, True, Int8KV)],
    ids=str,
)
def test_each_device_has_pages_that_its_kernels_read(
    device: torch.device, is_int8: bool, kind: type[PagedKV]
) -> None:
    """What a pool takes for them (here on the CPU) has the bytes that were planned."""
    geometry = cache_geometry(LLAMA, 16, torch.float32, device, is_int8)
    kv = KVPool(geometry, 5, torch.float32, CPU).allocate()
    assert type(kv) is kind
    assert sum(slab.nbytes for slab in kv.slabs) == 5 * geometry.page_bytes
    assert geometry.is_int8 == is_int8


def test_int8_pages_that_no_kernel_of_the_cpu_reads_are_refused() -> None:
    """On a GPU they serve float16, too."""
    assert cache_geometry(LLAMA, 16, torch.float16, CUDA, True).is_int8
    with pytest.raises(ValueError, match=r"no int8 pages of 16 tokens for torch\.float16 on cpu"):
        cache_geometry(LLAMA, 16, torch.float16, CPU, True)
