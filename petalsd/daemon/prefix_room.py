"""How much host memory the prefix cache may take."""

from __future__ import annotations

import torch

from petalsd.config import EngineSection
from petalsd.daemon.memory import device_memory_bytes
from petalsd.errors import ConfigError

# Beside the share of a CPU's memory that serving takes (``plan``), of which the rest is ten times as much.
_AUTO_SHARE = 32
_AUTO_MAX_BYTES = 4 << 30


def prefix_cache_bytes(engine: EngineSection) -> int:
    """ConfigError when more was asked for than there is."""
    setting, available_bytes = engine.prefix_cache_bytes, device_memory_bytes(torch.device("cpu"))
    if setting == "auto":
        return auto_prefix_bytes(available_bytes)
    if setting > available_bytes:
        raise ConfigError(
            f"engine.prefix_cache_bytes = {setting}: {available_bytes} bytes of memory are available",
            hint="lower it; 0: every prompt is computed",
        )
    return setting


def auto_prefix_bytes(available_bytes: int) -> int:
    """A thirty-second of the memory, at most 4 GiB."""
    return min(available_bytes // _AUTO_SHARE, _AUTO_MAX_BYTES)
