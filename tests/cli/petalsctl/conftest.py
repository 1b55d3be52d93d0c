"""A fake daemon where petalsctl looks for one, and petalsctl in this process or on a terminal."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from petalsd.cli.petalsctl import context
from petalsd.cli.petalsctl.instances import System
from petalsd.cli.petalsctl.main import main
from tests.cli.petalsctl.fake_daemon import FakeDaemon
from tests.cli.petalsctl.screen import TerminalCommand

Ctl = Callable[..., tuple[int, str, str]]
Start = Callable[[Path], FakeDaemon]


@pytest.fixture
def home() -> Iterator[Path]:
    """Short, for the path of a UNIX socket has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="ctl-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def system(home: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    """Services' directories and this user's, all empty."""
    made = System(home / "run", home / "etc")
    monkeypatch.setattr(context, "System", lambda: made)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "user"))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "RUNTIME_DIRECTORY", "STATE_DIRECTORY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def start_daemon(home: Path) -> Iterator[Start]:
    running: list[FakeDaemon] = []

    def start(path: Path) -> FakeDaemon:
        running.append(FakeDaemon(path))
        running[-1].start()
        return running[-1]

    yield start
    for daemon in running:
        daemon.stop()


@pytest.fixture
def daemon(system: System, start_daemon: Start) -> FakeDaemon:
    """The service petalsd@demo, the only instance there is."""
    return start_daemon(system.run_dir / "demo" / "control.sock")


@pytest.fixture
def ctl(system: System, capfd: pytest.CaptureFixture[str]) -> Ctl:
    """Runs petalsctl here: (exit status, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            status = main(words)
        except SystemExit as usage:
            status = int(usage.code or 0)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def on_terminal(home: Path) -> Iterator[Callable[..., TerminalCommand]]:
    """Runs petalsctl on a pseudo-terminal of 80 columns; ended with the test."""
    commands: list[TerminalCommand] = []

    def run(daemon: FakeDaemon, *words: str, **environ: str) -> TerminalCommand:
        commands.append(
            TerminalCommand(["--socket", str(daemon.path), *words], environ | {"HOME": str(home)})
        )
        return commands[-1]

    yield run
    for command in commands:
        command.kill()
