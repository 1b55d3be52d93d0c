"""``petalsctl wait``: until the daemon serves, is drained or is gone, and never longer than asked."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from petalsd.cli.petalsctl import wait
from petalsd.cli.petalsctl.instances import System
from tests.cli.petalsctl.conftest import Ctl
from tests.cli.petalsctl.documents import STATUS, document
from tests.cli.petalsctl.fake_daemon import Answer, FakeDaemon, refusal
from tests.cli.petalsctl.test_status import OnTerminal


def states(*names: str) -> Callable[[], Answer]:
    """A status per question, the last one for ever."""
    left = list(names)

    def answer() -> Answer:
        state = left.pop(0) if len(left) > 1 else left[0]
        return 200, json.dumps(document(STATUS, state=state, reason="why")).encode()

    return answer


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "_POLL_S", 0.005)


@pytest.mark.parametrize(
    ("words", "names", "outcome"),
    [
        ([], ("starting", "loading", "online"), "serving\n"),
        (["--ready"], ("drained", "online"), "serving\n"),
        (["--drained"], ("online", "draining", "drained"), "drained\n"),
        (["--offline"], ("stopping", "stopped"), "gone\n"),
    ],
)
def test_it_ends_when_the_state_is_reached(
    words: list[str], names: tuple[str, ...], outcome: str, daemon: FakeDaemon, ctl: Ctl
) -> None:
    daemon.answers["GET /v1/status"] = states(*names)
    assert ctl("wait", *words) == (0, outcome, "")
    assert len(daemon.requests) == len(names)


@pytest.mark.parametrize("words", [["wait", "--timeout", "5"], ["status", "--watch", "--interval", "0.1"]])
def test_a_daemon_with_too_many_connections_is_asked_again(
    words: list[str], daemon: FakeDaemon, on_terminal: OnTerminal
) -> None:
    """For a moment no request is read; that ends neither a wait nor a watch."""
    refused = [False, True, False]
    busy, starting = refusal(503, "overloaded", "too many connections"), states("starting")

    def answer() -> Answer:
        if not refused:
            return states("online")()
        return busy() if refused.pop(0) else starting()

    daemon.answers["GET /v1/status"] = answer
    command = on_terminal(daemon, *words)
    if words[0] == "status":
        command.wait_for(lambda text: "too many connections" in text)
        command.wait_for(lambda text: "is online" in text)
        command.press_ctrl_c()
    assert command.finish() == 0


def test_the_time_is_bounded(daemon: FakeDaemon, ctl: Ctl) -> None:
    """Exit 1 with the state it is in: nothing failed, it is just not there yet."""
    daemon.answers["GET /v1/status"] = states("loading")
    status, out, err = ctl("wait", "--timeout", "0.05")
    assert (status, out) == (1, "")
    assert err.startswith("petalsctl: not serving after 0.1 s: it is loading\n  petalsctl status")


def test_a_daemon_that_is_not_there_yet(system: System, ctl: Ctl) -> None:
    """It may still be started: asked until the time is over, then exit 2."""
    system.config_dir.mkdir()
    (system.config_dir / "demo.toml").touch()
    status, _, err = ctl("-i", "demo", "wait", "--timeout", "0.05")
    assert status == 2
    assert "petalsd@demo is not running" in err
    assert ctl("-i", "demo", "wait", "--offline")[0] == 0


@pytest.mark.parametrize(
    ("words", "names", "text"),
    [
        (["--ready"], ("loading", "failed"), "the daemon has failed: why"),
        (["--drained"], ("draining", "online"), "the drain was called off"),
    ],
)
def test_what_cannot_come_any_more_is_not_waited_for(
    words: list[str], names: tuple[str, ...], text: str, daemon: FakeDaemon, ctl: Ctl
) -> None:
    """Exit 4 at once."""
    daemon.answers["GET /v1/status"] = states(*names)
    status, _, err = ctl("wait", *words)
    assert status == 4
    assert text in err


def test_json_is_the_last_status(daemon: FakeDaemon, ctl: Ctl) -> None:
    daemon.answers["GET /v1/status"] = states("loading", "online")
    status, out, _ = ctl("wait", "--json")
    assert status == 0
    assert json.loads(out)["state"] == "online"


def test_the_terminal_shows_what_is_waited_for(daemon: FakeDaemon, on_terminal: OnTerminal) -> None:
    """One line, redrawn, gone at the end; Ctrl-C ends it at once."""
    loading = {
        "stage": "fetching", "item": "a.safetensors", "done": 1, "total": 4, "unit": "files", "percent": 25.0,
    }  # fmt: skip
    daemon.answers["GET /v1/status"] = document(STATUS, state="loading", loading=loading)
    command = on_terminal(daemon, "wait", "--timeout", "60")
    command.wait_for(lambda text: "demo is loading: fetching a.safetensors, 25 %, 1 of 4 files" in text)
    daemon.answers["GET /v1/status"] = STATUS
    assert command.finish() == 0
    assert command.screen.text == "serving"
    assert command.screen.has_cursor

    daemon.answers["GET /v1/status"] = document(STATUS, state="loading", loading=loading)
    command = on_terminal(daemon, "wait")
    command.wait_for(lambda text: "fetching" in text)
    command.press_ctrl_c()
    assert command.finish() == 130
    assert command.screen.text == ""
