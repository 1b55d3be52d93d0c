"""Room on the disks that the daemon writes to."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from petalsd.daemon import disks as disks_module
from petalsd.daemon.disks import Disks
from petalsd.daemon.surroundings import Surroundings
from petalsd.daemon.warnings import WarningBoard
from tests.daemon.fakes import Stage

DEADLINE_S = 10.0


async def test_a_full_disk_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there is room again."""
    board = WarningBoard()
    watch = Surroundings(Stage().member, Disks({"state": tmp_path}), board)
    await watch.look_at_disks()
    assert board.active() == []
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    await watch.look_at_disks()
    assert f"10 MiB left in {tmp_path}" in board.active()[0].title
    monkeypatch.undo()
    await watch.look_at_disks()
    assert board.active() == []


async def test_a_disk_that_is_gone_is_warned_of_and_ends_nothing(tmp_path: Path) -> None:
    """The others are looked at all the same."""
    board, disks = WarningBoard(), Disks({"cache": tmp_path / "gone", "state": tmp_path})
    await Surroundings(Stage().member, disks, board).look_at_disks()
    assert "No such file" in board.active()[0].title
    assert [reading.labels for reading in disks.readings()] == [("state",)]


async def test_a_disk_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, not again at each look, and counts once it answers."""
    monkeypatch.setattr(disks_module, "_ANSWER_S", 0.05)
    answering, asked, real = threading.Event(), [], shutil.disk_usage

    def usage(path: Path) -> object:
        if path.name == "network":
            asked.append(path)
            answering.wait(DEADLINE_S)
        return real(tmp_path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    disks = Disks({"state": tmp_path, "cache": tmp_path / "network"})
    for _ in range(2):
        assert await disks.look() == [f"{tmp_path / 'network'} does not answer"]
    assert [reading.labels for reading in disks.readings()] == [("state",)]
    assert len(asked) == 1
    answering.set()
    async with asyncio.timeout(DEADLINE_S):
        while await disks.look():
            pass
    assert [reading.labels for reading in disks.readings()] == [("state",), ("cache",)]


async def test_nobody_waits_for_a_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that was given up leaves no task behind."""
    monkeypatch.setattr(disks_module, "_ANSWER_S", 0.01)
    answering = threading.Event()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: answering.wait(DEADLINE_S))
    disks = Disks({"state": tmp_path})
    await disks.look()
    (look,) = (task for task in asyncio.all_tasks() if task.get_name() == "disk-state")
    disks.close()
    await asyncio.wait([look], timeout=DEADLINE_S)
    assert look.cancelled()
    answering.set()
