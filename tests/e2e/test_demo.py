"""The demo as a newcomer runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.demo_model, pytest.mark.timeout(300)]

MARK = "PETALSD_TEST_MARK"


def start_demo(model: Path, mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "petalsd.demo", str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {MARK: mark},
    )


def processes_with(mark: str) -> list[str]:
    """Command lines of all processes whose environment holds the mark: the demo's own, and their children."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_it_answers_and_leaves_nothing_behind(demo_model: Path) -> None:
    """An answer, its speed and a table of both daemons; no process is left."""
    mark = uuid.uuid4().hex
    process = start_demo(demo_model, mark)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert "tokens/s (first after" in output
    rows = [line for line in output.splitlines() if "online" in line]
    assert len(rows) == 2
    assert "0:15" in rows[0]
    assert "15:30" in rows[1]
    assert "both daemons are stopped" in output
    assert processes_with(mark) == []


@pytest.mark.parametrize(
    "line", ["starting the first daemon", "> "], ids=["while-starting", "while-answering"]
)
def test_ctrl_c_leaves_no_process_behind(demo_model: Path, line: str) -> None:
    """SIGINT at any moment stops the daemons and their p2p processes, and says so without a traceback."""
    mark = uuid.uuid4().hex
    process = start_demo(demo_model, mark)
    assert process.stdout is not None
    for text in process.stdout:
        if text.lstrip().startswith(line):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert processes_with(mark) == []


def test_a_killed_demo_takes_its_daemons_along(demo_model: Path) -> None:
    """SIGKILL cannot be caught; the kernel tells the daemons."""
    mark = uuid.uuid4().hex
    process = start_demo(demo_model, mark)
    assert process.stdout is not None
    for text in process.stdout:
        if text.lstrip().startswith("starting the second daemon"):
            break
    assert len(processes_with(mark)) > 1
    process.kill()
    process.communicate(timeout=30)
    deadline_s = time.monotonic() + 60
    while left := processes_with(mark):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.2)
