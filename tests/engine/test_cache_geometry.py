"""In which order and precision keys and values are kept, by device."""

from __future__ import annotations

import pytest
import torch

from petalsd.engine.cache_geometry import cache_geometry
from petalsd.kvcache.pool import KVPool
from petalsd.models.block_config import BlockConfig
from petalsd.ops.eight_bit_kv import FLOAT8, Float8KV, Int8KV
from petalsd.ops.head_major import HeadMajorKV
from petalsd.ops.ragged import PagedKV

LLAMA = BlockConfig.from_hf(
    {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 128, "torch_dtype": "float32",
    }
)  # fmt: skip
CPU, CUDA, F32 = torch.device("cpu"), torch.device("cuda"), torch.float32


@pytest.fixture(autouse=True)
def a_gpu_of_8_9(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))


@pytest.mark.parametrize(
    ("device", "stored", "kind"),
    [
        (CPU, F32, HeadMajorKV),
        (CPU, torch.int8, HeadMajorKV),
        (CUDA, F32, PagedKV),
        (CUDA, torch.int8, Int8KV),
        (CUDA, FLOAT8, Float8KV),
    ],
    ids=str,
)
def test_each_device_has_pages_that_its_kernels_read(
    device: torch.device, stored: torch.dtype, kind: type[PagedKV]
) -> None:
    """What a pool takes for them (here on the CPU) has the bytes that were planned."""
    geometry = cache_geometry(LLAMA, 16, F32, device, stored)
    kv = KVPool(geometry, 5, F32, CPU).allocate()
    assert type(kv) is kind and kv.k.dtype == stored
    assert sum(slab.nbytes for slab in kv.slabs) == 5 * geometry.page_bytes


def test_pages_are_of_the_dtype_unless_something_else_is_asked_for() -> None:
    assert cache_geometry(LLAMA, 16, torch.float16, CUDA).stored == torch.float16


def test_int8_pages_that_no_kernel_of_the_cpu_reads_are_refused() -> None:
    """On a GPU they serve float16, too."""
    assert cache_geometry(LLAMA, 16, torch.float16, CUDA, torch.int8).stored == torch.int8
    with pytest.raises(ValueError, match=r"no int8 pages of 16 tokens for torch\.float16 on cpu"):
        cache_geometry(LLAMA, 16, torch.float16, CPU, torch.int8)


def test_float8_pages_need_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CPU has them, nor does a GPU below compute capability 8.9."""
    with pytest.raises(ValueError, match=r"float8 pages need a GPU of compute capability 8\.9, not the CPU"):
        cache_geometry(LLAMA, 16, F32, CPU, FLOAT8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"need compute capability 8\.9, cuda has 8\.6"):
        cache_geometry(LLAMA, 16, F32, CUDA, FLOAT8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert cache_geometry(LLAMA, 16, F32, CUDA, FLOAT8).stored == FLOAT8
