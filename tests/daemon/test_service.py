"""What the service manager and a person are told about each moment of the daemon's life."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from petalsd.daemon import surroundings
from petalsd.daemon.activity import Situation, describe
from petalsd.daemon.disks import Disks
from petalsd.daemon.reloading import Reloader
from petalsd.daemon.service import Service
from petalsd.daemon.settings import Settings
from petalsd.daemon.span_loader import LoadProgress
from petalsd.daemon.surroundings import Surroundings
from petalsd.daemon.warnings import WarningBoard
from petalsd.errors import ConfigError
from petalsd.types import BlockSpan, DaemonState
from tests.daemon.fakes import Stage
from tests.daemon.test_daemon import DEADLINE_S, stopped, until_online
from tests.waiting import eventually

SERVING = Situation(
    state=DaemonState.ONLINE, reason="", activity="", progress=None, span=BlockSpan(0, 15), num_blocks=30,
    model="SmolLM2-hf", sessions=1, cache_used=0.125, deadline_left_s=None,
)  # fmt: skip


class Heard:
    """A notifier that writes down what it is told; the many extensions of time as one."""

    watchdog_interval_s = None

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __getattr__(self, name: str) -> object:
        def note(*arguments: object) -> None:
            message = " ".join([name, *map(str, arguments)])
            if message not in self.messages[-1:]:
                self.messages.append(message)

        return note


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "Serving blocks 0:15 of 30 of SmolLM2-hf: 1 session, 12% of the cache used"),
        ({"state": DaemonState.STARTING, "activity": "joining the swarm"}, "Starting: joining the swarm"),
        (
            {"state": DaemonState.LOADING, "progress": LoadProgress("fetch", "a.safetensors", 2**21, 2**23)},
            "Loading blocks 0:15: a.safetensors, 2 of 8 MiB, 25 %",
        ),
        (
            {
                "state": DaemonState.LOADING,
                "progress": LoadProgress("load", "block 3", 3, 15),
                "trouble": "loading the blocks failed: no network",
            },
            "Loading: loading the blocks failed: no network; it is tried again",
        ),
        (
            {"trouble": "loading the blocks failed"},
            "Serving blocks 0:15 of 30 of SmolLM2-hf: 1 session, 12% of the cache used",
        ),
        (
            {"state": DaemonState.LOADING, "progress": LoadProgress("load", "block 3", 3, 15)},
            "Loading blocks 0:15: block 3, 3 of 15 done, 20 %",
        ),
        (
            {
                "state": DaemonState.LOADING,
                "progress": LoadProgress("load", "block 3", 9, 15),
                "num_online": 9,
            },
            "Loading blocks 0:15: 9 of 15 online, 1 session, block 3, 9 of 15 done, 60 %",
        ),
        ({"state": DaemonState.REBALANCING, "activity": "choosing blocks"}, "Rebalancing: choosing blocks"),
        (
            {"state": DaemonState.DRAINING, "sessions": 3, "deadline_left_s": 41.6},
            "Draining: 3 sessions left, 42 s to the deadline",
        ),
        ({"state": DaemonState.DRAINED}, "Drained: serves nobody until it is resumed or stopped"),
        ({"state": DaemonState.FAILED, "reason": "no space"}, "Failed: no space"),
        ({"state": DaemonState.STOPPED}, "Stopped"),
    ],
)
def test_each_moment_has_its_sentence(changes: dict[str, object], line: str) -> None:
    assert describe(replace(SERVING, **changes)) == line  # type: ignore[arg-type]


async def test_systemd_hears_ready_once_and_stopping_before_the_end() -> None:
    """READY=1 with the first ONLINE and not before; STOPPING=1 when a stop is asked for, draining included."""
    heard = Heard()
    stage = Stage("blocks.span=0:2")
    service = Service(heard, lambda: stage.daemon.lifecycle.state.value)  # type: ignore[arg-type]
    stage.daemon.lifecycle.subscribe(service.on_move)
    telling = asyncio.create_task(service.run())
    running = await until_online(stage)
    assert heard.messages == [
        "status starting", "extend_timeout 30.0", "status loading", "status online", "ready"
    ]  # fmt: skip
    heard.messages.clear()
    service.stopping()
    await stopped(stage, running)
    assert heard.messages == [
        "stopping", "status draining", "status drained", "status stopping", "status stopped"
    ]  # fmt: skip
    telling.cancel()


async def test_a_reload_is_announced_and_ends_ready_even_when_refused() -> None:
    """systemd waits between RELOADING=1 and READY=1: a bad file must not leave it waiting."""
    heard = Heard()
    stage = Stage("blocks.span=0:2")
    service = Service(heard, lambda: "")  # type: ignore[arg-type]
    stage.daemon.lifecycle.subscribe(service.on_move)
    running = await until_online(stage)
    reloader = Reloader(stage.settings, stage.supervisor.check_now, service, stage.board)
    stage.overrides.append("daemon.drain_deadline_s=7")
    stage.overrides.append("engine.threads=3")
    heard.messages.clear()
    outcome = await reloader.reload()
    assert (outcome.applied, outcome.pending) == (("daemon.drain_deadline_s",), ("engine.threads",))
    assert heard.messages == ["reloading", "ready"]
    assert [warning.code for warning in stage.board.active()] == ["restart_needed"]
    heard.messages.clear()
    stage.overrides.append("daemon.drain_deadline_s=never")
    with pytest.raises(ConfigError, match="drain_deadline_s"):
        await reloader.reload()
    assert heard.messages == ["reloading", "ready"]
    assert stage.settings.config.daemon.drain_deadline_s == 7
    assert "reload_refused" in [warning.code for warning in stage.board.active()]
    stage.overrides += [f"engine.no_such_key_{number}=1" for number in range(3)]
    with pytest.raises(ConfigError):
        await reloader.reload()
    (refused,) = [one for one in stage.board.active() if one.code == "reload_refused"]
    assert "no_such_key_0" in refused.detail and refused.detail.endswith("; and 1 more")
    await stopped(stage, running)


async def test_a_reload_that_fails_by_a_bug_is_not_the_last() -> None:
    """Later ones would be left unanswered, and `systemctl reload` would wait in vain."""
    stage = Stage("blocks.span=0:2")
    outcomes: list[Exception | None] = [RuntimeError("a bug"), None]

    def check(config: object) -> None:
        if error := outcomes.pop(0):
            raise error

    settings = Settings(stage.settings.config, lambda: stage.settings.config, check)
    service = Service(Heard(), lambda: "")  # type: ignore[arg-type]
    asked = asyncio.Event()
    running = asyncio.create_task(Reloader(settings, None, service, stage.board).run(asked))
    for num_left in (1, 0):
        asked.set()
        await asyncio.wait_for(eventually(lambda: len(outcomes) == num_left), DEADLINE_S)  # noqa: B023
    running.cancel()


async def test_a_lost_swarm_is_warned_of_until_somebody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_PERIOD_S", 0.01)
    monkeypatch.setattr(surroundings, "_REDIAL", replace(surroundings._REDIAL, first_delay_s=0.01))
    stage = Stage()
    stage.member.is_swarm_there = False
    board = WarningBoard()
    looking = asyncio.create_task(Surroundings(stage.member, Disks({}), board).run())
    await asyncio.wait_for(
        eventually(lambda: "3 attempts" in "".join(w.detail for w in board.active())), DEADLINE_S
    )
    assert [warning.code for warning in board.active()] == ["swarm_unreachable"]
    stage.member.is_swarm_there = True
    await asyncio.wait_for(eventually(lambda: not board.active()), DEADLINE_S)
    looking.cancel()
    assert stage.calls.count("renew") == 1  # what was told meanwhile may have reached nobody
