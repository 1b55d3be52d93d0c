"""How much host memory and disk the attention cache of idle sessions may take, and where."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from petalsd.config import EngineSection
from petalsd.daemon.memory import device_memory_bytes
from petalsd.daemon.plan import ServingPlan, size_text
from petalsd.errors import ConfigError
from petalsd.kvcache.sizing import pages_for
from petalsd.kvcache.spill import SpillArea
from petalsd.paths import InstancePaths, existing_part

# Clients ask for ten times what they use. Twelve caches promise a single peer, which may hold three quarters of
# them, more than eight times what a server that reserves memory for the whole of a session could.
AUTO_CACHES = 12
AUTO_HOST_CACHES = 2
# The rest of the disk belongs to weights, logs and others. The daemon warns of a full disk at a quarter of this.
KEEP_FREE_BYTES = 1 << 30
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class SpillPlan:
    """What a span would get; ``area`` is None where its cache stays where it is."""

    area: SpillArea | None
    summary: str


def plan_spill(engine: EngineSection, plan: ServingPlan, paths: InstancePaths, num_blocks: int) -> SpillPlan:
    """For a span of ``num_blocks``. ConfigError when there is less than was asked for; OSError."""
    file = _plan_file(engine, plan, paths, num_blocks)
    host_bytes = _host_bytes(engine, plan, num_blocks)
    if host_bytes == 0:
        return file
    area = file.area or SpillArea(paths.cache_dir, 0, KEEP_FREE_BYTES)
    summary = f"up to {size_text(host_bytes)} of page-locked memory; on the disk: {file.summary}"
    return SpillPlan(replace(area, host_bytes=host_bytes), summary)


def auto_host_bytes(cache_bytes: int, available_bytes: int) -> int:
    """Twice the cache, but at most a quarter of the memory: what is page-locked cannot be swapped or reclaimed."""
    return min(AUTO_HOST_CACHES * cache_bytes, available_bytes // 4)


def _host_bytes(engine: EngineSection, plan: ServingPlan, num_blocks: int) -> int:
    """None on a CPU, whose cache is in the same memory."""
    if plan.device.type == "cpu":
        return 0
    available_bytes = device_memory_bytes(torch.device("cpu"))
    if engine.kv_host_bytes == "auto":
        return auto_host_bytes(_cache_bytes(plan, num_blocks), available_bytes)
    if engine.kv_host_bytes > available_bytes:
        raise ConfigError(
            f"engine.kv_host_bytes = {engine.kv_host_bytes}: {available_bytes} bytes of memory are available",
            hint="lower it; 0: idle sessions go to the disk",
        )
    return engine.kv_host_bytes


def _cache_bytes(plan: ServingPlan, num_blocks: int) -> int:
    return pages_for(plan.kv_tokens, num_blocks, plan.geometry.page_tokens) * plan.geometry.page_bytes


def _plan_file(engine: EngineSection, plan: ServingPlan, paths: InstancePaths, num_blocks: int) -> SpillPlan:
    directory, setting = paths.cache_dir, engine.kv_spill_bytes
    if setting == 0:
        return SpillPlan(None, "off")
    free_bytes = max(0, shutil.disk_usage(existing_part(directory)).free - KEEP_FREE_BYTES)
    if setting == "auto":
        if is_in_memory(directory):
            return SpillPlan(None, f"none: {directory} is in memory itself")
        max_bytes = auto_spill_bytes(_cache_bytes(plan, num_blocks), free_bytes)
    else:
        max_bytes = setting
    if max_bytes > free_bytes:
        raise ConfigError(
            f"engine.kv_spill_bytes = {max_bytes}: {directory} has room for {free_bytes} bytes",
            hint=f"lower it or free the disk, of which {KEEP_FREE_BYTES} bytes are left to others; 0: no file",
        )
    area = SpillArea(directory, max_bytes, KEEP_FREE_BYTES)
    return SpillPlan(area, f"up to {size_text(max_bytes)} in {directory}, taken as sessions need it")


def auto_spill_bytes(cache_bytes: int, free_bytes: int) -> int:
    """Twelve times the cache, but at most half of what is free."""
    return min(AUTO_CACHES * cache_bytes, free_bytes // 2)


def is_in_memory(directory: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether files there take memory, so that nothing is won by moving pages to them."""
    device = existing_part(directory).stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_text().splitlines():
        place, _, kind = line.partition(" - ")
        if place.split()[2] == number:
            return kind.split()[0] in _MEMORY_FILE_SYSTEMS
    return False
