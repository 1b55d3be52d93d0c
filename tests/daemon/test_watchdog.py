"""When the ping is earned, and what is said when it is not."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from petalsd.daemon import loop_watch
from petalsd.daemon.loop_watch import LoopWatch, stack_of
from petalsd.daemon.warnings import KINDS, WarningBoard
from petalsd.daemon.watchdog import Watchdog
from petalsd.errors import EngineError, NotServed, SwarmError
from tests.daemon.fakes import FakeEngine
from tests.waiting import eventually

INTERVAL_S = 0.4


class FakeNotifier:
    """Counts what the service manager would hear."""

    proof_interval_s = INTERVAL_S

    def __init__(self) -> None:
        self.pings = 0
        self.triggers = 0
        self.heard = asyncio.Event()

    def watchdog(self) -> None:
        self.pings += 1
        self.heard.set()

    def watchdog_trigger(self) -> None:
        self.triggers += 1
        self.heard.set()


class Scene:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.notifier = FakeNotifier()
        self.board = WarningBoard()
        self.trouble = 0
        self.watchdog = Watchdog(engine, self.notifier, self.board, self._on_trouble)  # type: ignore[arg-type]

    def _on_trouble(self) -> None:
        self.trouble += 1

    async def look(self, times: int = 1) -> None:
        """Until the service manager has heard something ``times`` times."""
        running = asyncio.create_task(self.watchdog.run())
        for _ in range(times):
            self.notifier.heard.clear()
            await asyncio.wait_for(self.notifier.heard.wait(), 10)
        running.cancel()

    def codes(self) -> list[str]:
        return [warning.code for warning in self.board.active()]


async def test_an_idle_engine_proves_itself_by_a_canary() -> None:
    scene = Scene(FakeEngine([]))
    await scene.look(3)
    assert scene.engine.calls.count("self-test") >= 2
    assert (scene.notifier.triggers, scene.codes()) == (0, [])


async def test_work_that_moves_needs_no_canary() -> None:
    scene = Scene(FakeEngine([]))

    class Moving(FakeEngine):
        def stats(self) -> Any:
            self.iterations += 1
            return super().stats()

    scene = Scene(Moving([]))
    await scene.look(3)
    assert scene.engine.calls == []
    assert scene.notifier.pings == 3


async def test_a_batch_that_does_not_end_is_a_hang() -> None:
    """The process asks to be restarted at once, and the warning says what it was at."""
    scene = Scene(FakeEngine([], busy_since_s=time.monotonic() - 100, busy_tokens=4, slowest_token_s=0.01))
    with structlog.testing.capture_logs() as logs:
        await scene.look()
    assert (scene.notifier.pings, scene.notifier.triggers, scene.trouble) == (0, 1, 1)
    assert scene.codes() == ["engine_stuck"]
    assert "4 tokens" in scene.board.active()[0].detail
    assert any(entry["event"] == "engine_stuck" for entry in logs)


async def test_a_long_prefill_is_no_hang() -> None:
    """1024 tokens at 0.1 s each may take longer than the whole interval."""
    scene = Scene(FakeEngine([], busy_since_s=time.monotonic() - 100, busy_tokens=1024, slowest_token_s=0.1))
    await scene.look(3)
    assert (scene.notifier.pings, scene.notifier.triggers) == (3, 0)


async def test_a_hang_is_noticed_within_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that begins right after a look that went well: our own canary is no proof of the next one."""

    class Hanging(FakeEngine):
        async def self_test(self) -> None:
            self.iterations += 1
            if self.iterations > 1:
                self.busy_since_s = time.monotonic()
                await asyncio.sleep(60)

    interval_s = 2.0
    monkeypatch.setattr(FakeNotifier, "proof_interval_s", interval_s)
    scene = Scene(Hanging([]))
    scene.watchdog._iterations = 0
    running = asyncio.create_task(scene.watchdog.run())
    await eventually(lambda: scene.notifier.pings)
    began_s = time.monotonic()
    await eventually(lambda: scene.notifier.triggers)
    running.cancel()
    assert time.monotonic() - began_s < interval_s


async def test_a_canary_that_is_lost_in_an_idle_engine_is_a_hang() -> None:
    class Deaf(FakeEngine):
        async def self_test(self) -> None:
            await asyncio.sleep(60)

    scene = Scene(Deaf([]))
    scene.watchdog._iterations = 0
    await scene.look()
    assert scene.notifier.triggers == 1
    assert "canary" in scene.board.active()[0].detail


async def test_a_canary_that_waits_behind_long_work_is_fine() -> None:
    class Busy(FakeEngine):
        async def self_test(self) -> None:
            self.iterations += 1
            await asyncio.sleep(60)

    scene = Scene(Busy([]))
    await scene.look(2)
    assert (scene.notifier.pings, scene.notifier.triggers) == (2, 0)


async def test_a_failed_canary_asks_for_a_new_engine_and_not_for_a_restart() -> None:
    scene = Scene(FakeEngine([], failures=[EngineError("not finite")]))
    scene.watchdog._iterations = 0
    await scene.look()
    assert (scene.notifier.pings, scene.notifier.triggers, scene.trouble) == (1, 0, 1)
    assert scene.codes() == ["engine_failed"]
    await scene.look()
    assert scene.codes() == []


async def test_without_blocks_the_loop_alone_is_proved() -> None:
    scene = Scene(FakeEngine([], failures=[NotServed("no blocks") for _ in range(9)]))
    await scene.look(2)
    assert (scene.notifier.pings, scene.trouble, scene.codes()) == (2, 0, [])


async def test_a_blocked_loop_is_seen_from_outside() -> None:
    """The thread beside the loop says where it hangs, while it hangs; a loop that moves again warns of it."""
    board = WarningBoard()
    with structlog.testing.capture_logs() as logs:
        watching = asyncio.create_task(LoopWatch(0.2, board).run())
        await asyncio.sleep(0)
        hang_here(0.8)
        await eventually(lambda: len(logs) >= 3)
        watching.cancel()
    events = {entry["event"]: entry for entry in logs}
    assert logs[0]["event"] == "loop_stuck"
    assert set(events) == {"loop_stuck", "loop_moves_again", "warning_raised"}
    assert any("hang_here" in place for place in events["loop_stuck"]["places"])
    (warning,) = board.active()
    assert (warning.code, warning.detail[:6]) == ("loop_stuck", "for 0.")


async def test_that_warning_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_watch, "_REMEMBERED_S", 0.3)
    board = WarningBoard()
    watching = asyncio.create_task(LoopWatch(0.1, board).run())
    await asyncio.sleep(0)
    hang_here(0.2)
    await eventually(lambda: board.active())
    await eventually(lambda: not board.active())
    watching.cancel()


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def test_the_stack_of_a_thread_that_is_not_there() -> None:
    assert stack_of("nobody") == []
    assert stack_of(threading.current_thread().name)[-1].endswith("stack_of")


@pytest.mark.parametrize("code", ["engine_stuck", "disk_full"])
def test_raising_a_warning_twice_keeps_its_time(code: str) -> None:
    now = [1.0]
    board = WarningBoard(lambda: now[0])
    board.set(code, "one")
    now[0] = 5.0
    board.set(code, "two")
    (warning,) = board.active()
    assert (warning.since_monotonic_s, warning.detail) == (1.0, "two")
    board.clear(code, "p2pd_failed")
    assert board.active() == []


def test_the_worst_warning_comes_first() -> None:
    board = WarningBoard()
    for code in ("restart_needed", "reload_refused", "swarm_unreachable"):
        board.set(code)
    assert [one.code for one in board.active()] == ["swarm_unreachable", "reload_refused", "restart_needed"]
    with pytest.raises(KeyError):
        board.set("no_such_warning")


def test_what_to_do_names_the_instance_that_is_meant() -> None:
    """With several on a machine, and for copying."""
    board = WarningBoard(instance="demo")
    for code in ("restart_needed", "reload_refused", "move_failed"):
        board.set(code)
    hints = {one.code: one.hint for one in board.active()}
    assert hints["restart_needed"].endswith("systemctl restart petalsd@demo")
    assert hints["reload_refused"].endswith("petalsctl -i demo reload")
    assert hints["move_failed"].endswith("petalsctl -i demo rebalance")


def test_an_error_knows_better_what_to_do() -> None:
    """Said once, and not beside general advice that does not fit; where it says nothing that stands."""
    board = WarningBoard()
    board.blame("join_failed", SwarmError("the key cannot be written: No space left", hint="make room there"))
    (warning,) = board.active()
    assert warning.title == "joining the swarm failed: swarm_error: the key cannot be written: No space left"
    assert warning.hint == "make room there"
    board.blame("join_failed", SwarmError("nobody answers"))
    (warning,) = board.active()
    assert warning.hint == KINDS["join_failed"].hint
    board.blame("load_failed", OSError(errno.EIO, "Input/output error", "/disk/x"), "blocks 0:2 are served")
    (warning,) = [one for one in board.active() if one.code == "load_failed"]
    assert warning.detail == "blocks 0:2 are served: [Errno 5] Input/output error: '/disk/x'"


def test_every_warning_is_documented() -> None:
    """The row of docs/operate.md is exactly what the code declares."""
    page = (Path(__file__).parents[2] / "docs" / "operate.md").read_text()
    for code, kind in KINDS.items():
        assert f"| `{code}` | {kind.severity} | {kind.title} | {kind.hint} |" in page
