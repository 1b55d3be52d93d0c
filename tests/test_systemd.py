"""The datagrams as a socket of the service manager's kind receives them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalsd.systemd import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(5.0)
        yield receiver


@pytest.fixture
def notifier(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notifier]:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier.take()
    yield notifier
    notifier.close()


def test_each_message(notifier: Notifier, manager: socket.socket) -> None:
    notifier.ready()
    notifier.status("two\n lines")
    notifier.extend_timeout(1.5)
    notifier.stopping()
    notifier.watchdog_trigger()
    received = [manager.recv(4096).decode() for _ in range(5)]
    assert received == [
        "READY=1", "STATUS=two lines", "EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1", "WATCHDOG=trigger"
    ]  # fmt: skip


def test_a_status_is_bounded(notifier: Notifier, manager: socket.socket) -> None:
    notifier.status("x" * 10_000)
    assert len(manager.recv(20_000)) == len("STATUS=") + 200


def test_a_status_may_hold_names_of_any_language(notifier: Notifier, manager: socket.socket) -> None:
    """systemd reads UTF-8. What is no text at all, as in the name of a directory, costs no more than itself."""
    notifier.status("Serving blocks 0:4 of modèle-模型 \udcff")
    assert manager.recv(4096).decode() == "STATUS=Serving blocks 0:4 of modèle-模型 ?"


def test_a_reload_names_its_time_in_the_same_datagram(notifier: Notifier, manager: socket.socket) -> None:
    before_us = time.monotonic_ns() // 1000
    notifier.reloading()
    first, second = manager.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert before_us <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_a_ping_is_remembered(notifier: Notifier, manager: socket.socket) -> None:
    assert notifier.last_ping_monotonic_s is None
    notifier.watchdog()
    assert manager.recv(4096) == b"WATCHDOG=1"
    assert notifier.last_ping_monotonic_s == pytest.approx(time.monotonic(), abs=5.0)


def test_children_do_not_speak_for_us(notifier: Notifier) -> None:
    show = "import os; print([name for name in os.environ if name.startswith(('NOTIFY_', 'WATCHDOG_'))])"
    shown = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
    assert notifier.watchdog_interval_s == 30.0


def test_a_watchdog_for_another_process_is_not_ours(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    notifier = Notifier.take()
    notifier.close()
    assert notifier.watchdog_interval_s is None


def test_outside_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier.take()
    for call in (notifier.ready, notifier.reloading, notifier.stopping, notifier.watchdog):
        call()
    assert notifier.watchdog_interval_s is None
