"""``petalsctl status --watch``: redrawn in place, through restarts of the daemon, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path

from tests.cli.petalsctl.documents import STATUS, document
from tests.cli.petalsctl.fake_daemon import FakeDaemon
from tests.cli.petalsctl.test_status import ONLINE, OnTerminal


def active(number: int) -> dict[str, object]:
    return document(STATUS, sessions={"active": number, "limit": 256, "rows": number, "waiting": 0})


def test_the_screen_is_redrawn_in_place(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """New figures replace the old ones; Ctrl-C leaves the last frame and the cursor, without a traceback."""
    daemon.answers["GET /v1/status"] = active(1)
    command = on_terminal(daemon, "status", "--watch", "--interval", "0.1")
    command.wait_for(lambda text: "1 of 256" in text)
    assert not command.screen.has_cursor
    daemon.answers["GET /v1/status"] = active(250)
    command.wait_for(lambda text: "250 of 256" in text)
    command.press_ctrl_c()
    assert command.finish() == 0
    assert command.screen.text == ONLINE.replace("3 of 256, 4 sequences", "250 of 256")
    assert command.screen.has_cursor


def test_a_daemon_may_go_and_come_back(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """While it is away the last figures stay, with how long ago they were; then it goes on."""
    daemon.answers["GET /v1/status"] = active(1)
    command = on_terminal(daemon, "status", "--watch", "--interval", "0.1")
    command.wait_for(lambda text: "1 of 256" in text)
    daemon.stop()
    command.wait_for(lambda text: "is not running; last" in text)
    assert "1 of 256" in command.screen.text
    back = FakeDaemon(daemon.path, {"GET /v1/status": active(2)})
    back.start()
    try:
        command.wait_for(lambda text: "2 of 256" in text and "not running" not in text)
        command.press_ctrl_c()
        assert command.finish() == 0
    finally:
        back.stop()
        daemon.start()  # for the fixture to stop


def test_a_daemon_that_never_answered_is_not_watched(home: Path, on_terminal: OnTerminal) -> None:
    """A mistaken name ends at once, exit 2."""
    command = on_terminal(FakeDaemon(home / "none.sock"), "status", "--watch")
    assert command.finish() == 2
    assert "is not running" in command.screen.text


def test_a_screen_that_is_too_small_shows_the_beginning(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """More lines than the screen has would make the frames pile up."""
    many = [
        {"code": f"code_{n}", "title": f"Title {n}", "severity": "info", "since_s": 1.0, "hint": "look"}
        for n in range(20)
    ]
    daemon.answers["GET /v1/status"] = document(STATUS, warnings=many)
    command = on_terminal(daemon, "status", "--watch", "--interval", "0.1")
    command.wait_for(lambda text: len(daemon.requests) > 2 and "Title 2" in text)
    command.press_ctrl_c()
    assert command.finish() == 0
    assert len(command.screen.text.splitlines()) <= 23
    assert "\x1b[23A" in command.raw
