"""The demo as a newcomer runs it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalsd.demo.daemons import deferred_interrupts
from tests.e2e.conftest import MEASURE_NOTHING

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.demo_model, pytest.mark.timeout(300)]

MARK = "PETALSD_TEST_MARK"


@contextlib.contextmanager
def running_demo(model: Path, mark: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "petalsd.demo", str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environ | {MARK: mark},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


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
    with running_demo(demo_model, mark) as process:
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
    ("words", "reason"),
    [
        (["/nonexistent"], "first ended before 'joined'"),
        (["/nonexistent", "--state", "/dev/null/x"], "/dev/null"),
    ],
)
def test_what_goes_wrong_is_told_on_a_terminal_without_unicode(words: list[str], reason: str) -> None:
    """Not by a traceback, of the failure or of the mark that such a terminal does not have."""
    done = subprocess.run(
        [sys.executable, "-m", "petalsd.demo", *words],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the demo failed: " in done.stderr and reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_a_started_daemon_has_an_owner(number: signal.Signals) -> None:
    """In the middle of starting a process it would be swallowed, or leave the process to nobody."""
    before = signal.signal(number, signal.default_int_handler)
    steps = []
    try:
        with pytest.raises(KeyboardInterrupt), deferred_interrupts():
            signal.raise_signal(number)
            steps.append("started and owned")
        assert steps
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("starting the first daemon", id="while-starting"),
        pytest.param("> ", id="while-answering", marks=pytest.mark.nightly),
    ],
)
def test_ctrl_c_leaves_no_process_behind(demo_model: Path, line: str) -> None:
    """SIGINT at any moment stops the daemons and their p2p processes, and says so without a traceback."""
    mark = uuid.uuid4().hex
    with running_demo(demo_model, mark, **MEASURE_NOTHING) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.lstrip().startswith(line):
                break
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert processes_with(mark) == []


@pytest.mark.nightly
def test_a_killed_demo_takes_its_daemons_along(demo_model: Path) -> None:
    """SIGKILL cannot be caught; the kernel tells the daemons."""
    mark = uuid.uuid4().hex
    with running_demo(demo_model, mark, **MEASURE_NOTHING) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.lstrip().startswith("starting the second daemon"):
                break
        assert len(processes_with(mark)) > 1
    deadline_s = time.monotonic() + 60
    while left := processes_with(mark):
        assert time.monotonic() < deadline_s, left
        time.sleep(0.2)
