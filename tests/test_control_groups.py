"""Limits of control groups, as the kernel's files have them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from petalsd.control_groups import memory_left_bytes, own_group, processor_quota

GROUP = "/system.slice/petalsd.service"


@pytest.fixture
def group(tmp_path: Path) -> Path:
    group = tmp_path / "system.slice" / "petalsd.service"
    group.mkdir(parents=True)
    return group


def test_the_smallest_distance_to_a_memory_limit_counts(tmp_path: Path, group: Path) -> None:
    """A limit of a parent group binds too; "max" and missing files are no limit."""
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100\n")
    assert memory_left_bytes(GROUP, tmp_path) == 1 << 62
    (group.parent / "memory.max").write_text("1000\n")
    (group.parent / "memory.current").write_text("400\n")
    assert memory_left_bytes(GROUP, tmp_path) == 600


def test_cached_files_are_no_loss(tmp_path: Path, group: Path) -> None:
    """A server that has just downloaded its weights has as much room as one that finds them there."""
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("900\n")
    (group / "memory.stat").write_text("anon 150\nfile 700\nshmem 100\ninactive_file 500\nactive_file 100\n")
    assert memory_left_bytes(GROUP, tmp_path) == 700
    (group / "memory.stat").write_text("slab_reclaimable 50\nslab_unreclaimable 100\nactive_file\n")
    assert memory_left_bytes(GROUP, tmp_path) == 150


def test_more_than_the_limit_leaves_nothing(tmp_path: Path, group: Path) -> None:
    """A limit that was lowered below what is used already."""
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("1400\n")
    assert memory_left_bytes(GROUP, tmp_path) == 0


def test_the_smallest_quota_of_processors_counts(tmp_path: Path, group: Path) -> None:
    """As for memory: parents bind, "max" and missing files do not."""
    assert processor_quota(GROUP, tmp_path) == math.inf
    (group / "cpu.max").write_text("max 100000\n")
    assert processor_quota(GROUP, tmp_path) == math.inf
    (group / "cpu.max").write_text("250000 100000\n")
    (group.parent / "cpu.max").write_text("400000 100000\n")
    assert processor_quota(GROUP, tmp_path) == 2.5
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert processor_quota(GROUP, tmp_path) == 1.5


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    """There the membership is "/", and the limits lie where the hierarchy is mounted."""
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert processor_quota("/", tmp_path) == 0.5


@pytest.mark.parametrize("text", ["", "100000", "100000 0", "-1 100000", "a b"])
def test_what_is_no_quota_does_not_bind(tmp_path: Path, text: str) -> None:
    """A future format must not keep a server from starting."""
    (tmp_path / "cpu.max").write_text(text)
    assert processor_quota("/", tmp_path) == math.inf


def test_own_group_is_that_of_the_unified_hierarchy(tmp_path: Path) -> None:
    """Beside the older version's, in any order."""
    membership = tmp_path / "cgroup"
    assert own_group(membership) == ""
    membership.write_text(f"4:memory:/elsewhere\n0::{GROUP}\n1:cpu:/\n")
    assert own_group(membership) == GROUP
