"""How much of the disk idle sessions' caches get, on disks of all kinds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from petalsd.daemon import spilling
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.spilling import (
    KEEP_FREE_BYTES,
    auto_host_bytes,
    auto_spill_bytes,
    is_in_memory,
    plan_spill,
)
from petalsd.errors import ConfigError
from petalsd.kvcache.sizing import pages_for
from petalsd.paths import InstancePaths
from tests.daemon.measured import plan_of
from tests.daemon.test_plan import configured

GIB = 1 << 30


class Usage(NamedTuple):
    free: int


@pytest.fixture
def plan(model_dir: Path, tmp_path: Path) -> ServingPlan:
    return plan_of(model_dir, tmp_path)


@pytest.fixture
def paths(tmp_path: Path) -> InstancePaths:
    """The cache directory does not exist yet."""
    return InstancePaths("t", tmp_path, tmp_path / "cache" / "below")


def with_free_disk(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda directory: Usage(free_bytes))
    monkeypatch.setattr(spilling, "is_in_memory", lambda directory: False)


def cache_bytes(plan: ServingPlan, num_blocks: int) -> int:
    return pages_for(plan.kv_tokens, num_blocks, plan.geometry.page_tokens) * plan.geometry.page_bytes


def test_with_room_it_is_twelve_caches(
    model_dir: Path, plan: ServingPlan, paths: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache directory, for the span's blocks, leaving a GiB to others."""
    with_free_disk(monkeypatch, 1000 * GIB)
    area = plan_spill(configured(model_dir).engine, plan, paths, 2).area
    assert area is not None
    assert (area.directory, area.keep_free_bytes) == (paths.cache_dir, KEEP_FREE_BYTES)
    assert area.max_bytes == 12 * cache_bytes(plan, 2)


def test_a_small_disk_gives_half_of_what_is_free(
    model_dir: Path, plan: ServingPlan, paths: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free_disk(monkeypatch, KEEP_FREE_BYTES + 1000)
    spill = plan_spill(configured(model_dir).engine, plan, paths, 2)
    assert spill.area is not None
    assert spill.area.max_bytes == 500
    assert spill.summary.startswith("up to 0.5 KiB in ")
    with_free_disk(monkeypatch, 5)
    area = plan_spill(configured(model_dir).engine, plan, paths, 2).area
    assert area is not None
    assert area.max_bytes == 0
    assert auto_spill_bytes(10, 1000) == 120


def test_what_is_asked_for_must_fit(
    model_dir: Path, plan: ServingPlan, paths: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configured size is taken as it is, or refused with both numbers."""
    with_free_disk(monkeypatch, KEEP_FREE_BYTES + 3 * GIB)
    area = plan_spill(configured(model_dir, "engine.kv_spill_bytes=3GiB").engine, plan, paths, 2).area
    assert area is not None
    assert area.max_bytes == 3 * GIB
    with pytest.raises(ConfigError, match=rf"kv_spill_bytes = {4 * GIB}: .* has room for {3 * GIB} bytes"):
        plan_spill(configured(model_dir, "engine.kv_spill_bytes=4GiB").engine, plan, paths, 2)


def test_it_can_be_switched_off(model_dir: Path, plan: ServingPlan, paths: InstancePaths) -> None:
    assert plan_spill(configured(model_dir, "engine.kv_spill_bytes=0").engine, plan, paths, 2).area is None


def test_memory_is_not_spilled_to_memory(
    model_dir: Path, plan: ServingPlan, paths: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Automatically never; who names a size may have their reasons."""
    monkeypatch.setattr(spilling, "is_in_memory", lambda directory: True)
    spill = plan_spill(configured(model_dir).engine, plan, paths, 2)
    assert spill.area is None
    assert "in memory itself" in spill.summary
    assert plan_spill(configured(model_dir, "engine.kv_spill_bytes=1MB").engine, plan, paths, 2).area


def on_a_gpu(plan: ServingPlan) -> ServingPlan:
    return replace(plan, storage=replace(plan.storage, device=torch.device("cuda:0")))


def test_pages_of_a_gpu_go_to_host_memory_first(
    model_dir: Path, plan: ServingPlan, paths: InstancePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the cache or a quarter of the memory, beside the file or without one; on a CPU none."""
    with_free_disk(monkeypatch, 1000 * GIB)
    monkeypatch.setattr(spilling, "device_memory_bytes", lambda device: 100 * GIB)
    engine, gpu = configured(model_dir).engine, on_a_gpu(plan)
    both, memory, file = (
        plan_spill(configured(model_dir, *override).engine, gpu, paths, 2).area
        for override in ((), ("engine.kv_spill_bytes=0",), ("engine.kv_host_bytes=0",))
    )
    assert both is not None and memory is not None and file is not None
    assert (both.host_bytes, both.max_bytes) == (2 * cache_bytes(plan, 2), 12 * cache_bytes(plan, 2))
    assert (memory.host_bytes, memory.max_bytes) == (2 * cache_bytes(plan, 2), 0)
    assert (file.host_bytes, file.max_bytes) == (0, 12 * cache_bytes(plan, 2))
    on_cpu = plan_spill(engine, plan, paths, 2).area
    assert on_cpu is not None
    assert on_cpu.host_bytes == 0
    assert auto_host_bytes(100, 40) == 10
    with pytest.raises(ConfigError, match=r"kv_host_bytes = .* are available"):
        plan_spill(configured(model_dir, "engine.kv_host_bytes=200GiB").engine, gpu, paths, 2)


def test_file_systems_in_memory_are_known(tmp_path: Path) -> None:
    """By the device of the nearest directory that exists; /dev/shm is one on every Linux."""
    assert is_in_memory(Path("/dev/shm/missing"))
    mounts = tmp_path / "mountinfo"
    device = tmp_path.stat().st_dev
    line = f"29 1 {device >> 8 & 0xFFF}:{device & 0xFF} / / rw,relatime shared:1 - %s /dev/vda rw\n"
    for kind, expected in (("ext4", False), ("tmpfs", True), ("ramfs", True)):
        mounts.write_text("20 29 0:4 / /proc rw - proc proc rw\n" + line % kind)
        assert is_in_memory(tmp_path, mounts) is expected
    mounts.write_text("")
    assert not is_in_memory(tmp_path, mounts)
