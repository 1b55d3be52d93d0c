"""How much is served: blocks that fit the memory, tokens of cache, what the link carries. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from petalsd.errors import ConfigError
from petalsd.kvcache.sizing import KVGeometry, pages_for
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.model_config import ModelConfig
from petalsd.models.weight_storage import WeightStorage

# Reference clients count on these (models with grouped queries, others): tokens of cache per block, and the
# longest session.
KV_TOKENS = (16384, 4096)
MAX_SESSION_TOKENS = (8192, 2048)

# What backpropagation through a block needs at its peak: 2 GiB at hidden size 14336, in proportion elsewhere.
_PASS_BYTES_PER_HIDDEN = (2 << 30) / 14336
# Allocator rounding and the buffers beside the parameters.
_WEIGHTS_OVERHEAD = 1.01


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """Bytes that captured graphs take: ``reserve_bytes`` once, ``block_bytes`` for each block."""

    reserve_bytes: int = 0
    block_bytes: int = 0


# Before anything is captured, from what engines report of models of 1 to 8 billion parameters: 28 MiB for what the
# graphs of one batch size share, and 6 MiB for one of 16 layers; nine batch sizes.
ESTIMATED_GRAPHS = GraphMemory(9 * (28 << 20), 9 * (6 << 20) // 16)
_NO_GRAPHS = GraphMemory()


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that serving takes: ``reserve_bytes`` (passes) once, ``block_bytes`` (weights and cache) for a block,
    and ``graphs``.
    """

    block_bytes: int
    reserve_bytes: int
    graphs: GraphMemory = _NO_GRAPHS

    def of_blocks(self, num_blocks: int) -> int:
        return self._once_bytes + num_blocks * self._each_bytes

    def fitting_blocks(self, memory_bytes: int, limit: int) -> int:
        """The most blocks that fit, at most ``limit``; 0 when not even one does."""
        return max(0, min(limit, (memory_bytes - self._once_bytes) // self._each_bytes))

    @property
    def _once_bytes(self) -> int:
        return self.reserve_bytes + self.graphs.reserve_bytes

    @property
    def _each_bytes(self) -> int:
        return self.block_bytes + self.graphs.block_bytes


def kv_tokens_for(setting: int | str, config: ModelConfig) -> int:
    """Tokens of cache per block over all sessions."""
    return _by_groups(setting, config, KV_TOKENS)


def max_session_tokens_for(setting: int | str, config: ModelConfig, kv_tokens: int) -> int:
    """The longest session; a longer one than the cache holds could never be served."""
    longest = _by_groups(setting, config, MAX_SESSION_TOKENS)
    if setting == "auto":
        return min(longest, kv_tokens)
    if longest > kv_tokens:
        raise ConfigError(
            f"engine.max_session_tokens = {longest} is above the {kv_tokens} tokens of engine.kv_tokens",
            hint="raise kv_tokens or lower max_session_tokens",
        )
    return longest


def memory_need(
    architecture: Architecture,
    storage: WeightStorage,
    geometry: KVGeometry,
    kv_tokens: int,
    graphs: GraphMemory = _NO_GRAPHS,
    adapters: Sequence[Adapter] = (),
) -> MemoryNeed:
    """All blocks are counted as the model's largest."""
    cache_bytes = (pages_for(kv_tokens, 1, geometry.page_tokens) - 1) * geometry.page_bytes
    pass_bytes = int(architecture.config.hidden_size * _PASS_BYTES_PER_HIDDEN)
    block_bytes = block_weights_bytes(architecture, storage, adapters) + cache_bytes
    return MemoryNeed(block_bytes, pass_bytes, graphs)


def block_weights_bytes(
    architecture: Architecture, storage: WeightStorage, adapters: Sequence[Adapter] = ()
) -> int:
    """What the weights of the model's largest block take, with these adapters of it."""
    adapted = sum(adapter.max_block_nbytes(storage.dtype) for adapter in adapters)
    return int((storage.nbytes(architecture.largest_block()) + adapted) * _WEIGHTS_OVERHEAD)


def network_rps(network_mbps: float, hidden_size: int) -> float:
    """Tokens/s that the link carries: a token's hidden state takes 16 bits per element."""
    return network_mbps * 1e6 / (16 * hidden_size)


def _by_groups(setting: int | str, config: ModelConfig, defaults: tuple[int, int]) -> int:
    if isinstance(setting, int):
        return setting
    return defaults[0] if config.kv_groups > 1 else defaults[1]
