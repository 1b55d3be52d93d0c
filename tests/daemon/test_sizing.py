"""The arithmetic of what is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petalsd.config import Quantization
from petalsd.daemon.memory import available_bytes
from petalsd.daemon.sizing import (
    GraphMemory,
    MemoryNeed,
    kv_tokens_for,
    max_session_tokens_for,
    memory_need,
    network_rps,
)
from petalsd.errors import ConfigError
from petalsd.kvcache.sizing import KVGeometry
from petalsd.models.architecture import Architecture
from petalsd.models.block_config import BlockConfig
from petalsd.models.hf.families import FAMILIES
from petalsd.models.hf.layer import Layers
from petalsd.models.weight_storage import WeightStorage

GROUPED = BlockConfig(
    model_type="llama", num_blocks=80, hidden_size=8192, num_heads=64, num_kv_heads=8, head_dim=128,
    intermediate_size=28672, norm_eps=1e-5, activation="silu", qkv_bias=False, output_bias=False, mlp_bias=False,
    qk_norm=False, windows=(None,) * 80, rope={"rope_type": "default"}, vocab_size=128256, max_positions=131072,
    tie_word_embeddings=False, dtype=torch.bfloat16,
)  # fmt: skip
ARCHITECTURE = Architecture(GROUPED, GROUPED, Layers(FAMILIES["llama"], None))
UNGROUPED = replace(GROUPED, num_kv_heads=64)
PLAIN = WeightStorage(torch.bfloat16, torch.device("cuda:0"), None)
PARAMETERS = 855_654_400  # of a block, as published
GEOMETRY = KVGeometry(page_tokens=16, num_kv_heads=8, head_dim=128, stored=torch.bfloat16)


def test_cache_and_session_limits_are_the_reference_ones() -> None:
    """Models with grouped queries get 16384 and 8192 tokens, others 4096 and 2048, unless configured."""
    assert (kv_tokens_for("auto", GROUPED), kv_tokens_for("auto", UNGROUPED)) == (16384, 4096)
    assert max_session_tokens_for("auto", GROUPED, 16384) == 8192
    assert max_session_tokens_for("auto", UNGROUPED, 4096) == 2048
    assert kv_tokens_for(700, GROUPED) == 700


def test_no_session_may_be_longer_than_the_cache() -> None:
    """An automatic limit follows a small cache; a configured one above it is an error that names both keys."""
    assert max_session_tokens_for("auto", GROUPED, 700) == 700
    with pytest.raises(ConfigError, match="raise kv_tokens or lower max_session_tokens"):
        max_session_tokens_for(8192, GROUPED, 4096)


def test_memory_need_adds_weights_and_cache() -> None:
    """Per block: weights with 1 % overhead and 2 * tokens * kv heads * head size * bytes of cache."""
    need = memory_need(ARCHITECTURE, PLAIN, GEOMETRY, kv_tokens=16384)
    assert need.block_bytes == int(PARAMETERS * 2 * 1.01) + 2 * 16384 * 8 * 128 * 2
    assert need.reserve_bytes == (2 << 30) * 8192 // 14336
    graphs = GraphMemory(reserve_bytes=1000, block_bytes=10)
    more = memory_need(ARCHITECTURE, PLAIN, GEOMETRY, kv_tokens=16384, graphs=graphs)
    assert more.of_blocks(3) - need.of_blocks(3) == 1030
    assert more.fitting_blocks(need.of_blocks(3) + 1029, 80) == 2
    assert more.fitting_blocks(need.of_blocks(3) + 1030, 80) == 3


@pytest.mark.parametrize(
    ("quantization", "bits"), [("none", 16), ("int8", 8), ("int4", 4.25)], ids=["none", "int8", "int4"]
)
def test_quantized_blocks_need_less_memory(quantization: Quantization, bits: float) -> None:
    """Weights take the bits of their format with its scales; cache, norms and the reserve stay what they are."""
    storage = WeightStorage.choose(torch.bfloat16, torch.device("cpu"), quantization)
    need, plain = (memory_need(ARCHITECTURE, each, GEOMETRY, kv_tokens=16384) for each in (storage, PLAIN))
    weights_bytes = need.block_bytes - 2 * 16384 * 8 * 128 * 2
    assert weights_bytes == pytest.approx(PARAMETERS * bits / 8 * 1.01, rel=1e-3)
    assert need.reserve_bytes == plain.reserve_bytes


def test_as_many_blocks_as_fit() -> None:
    """The reserve is taken once; the count is capped by the model and never negative."""
    need = MemoryNeed(block_bytes=10, reserve_bytes=5)
    assert [need.fitting_blocks(memory, 4) for memory in (0, 14, 15, 34, 35, 1000)] == [0, 0, 1, 2, 3, 4]
    assert need.of_blocks(3) == 35


def test_available_memory_is_read_in_bytes(tmp_path: Path) -> None:
    """MemAvailable of /proc/meminfo is given in KiB."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2000 kB\nMemFree:  1 kB\nMemAvailable:   1000 kB\n")
    assert available_bytes(meminfo) == 1_024_000


def test_a_link_carries_tokens_of_two_bytes_per_element() -> None:
    assert network_rps(100.0, 8192) == pytest.approx(762.9, abs=0.1)
