"""What the daemon is at, in a sentence: the line of `systemctl status` and of `petalsctl status`."""

from __future__ import annotations

from dataclasses import dataclass

from petalsd.daemon.span_loader import LoadProgress
from petalsd.types import BlockSpan, DaemonState

_ON_THE_WAY = (DaemonState.STARTING, DaemonState.LOADING, DaemonState.REBALANCING)


class Activity:
    """Written by whoever does the work, also on other threads; read when somebody asks."""

    def __init__(self) -> None:
        self.text = "starting"
        self.progress: LoadProgress | None = None

    def at(self, text: str) -> None:
        """What is being done from now on."""
        self.progress = None
        self.text = text

    def loading(self, progress: LoadProgress) -> None:
        self.progress = progress


@dataclass(frozen=True, slots=True)
class Situation:
    """All that the sentence is made of.

    num_online        blocks of the span that serve already while the others are loaded
    sessions          open ones, and passes under way
    cache_used        share of the attention cache's pages that are taken, 0 to 1
    deadline_left_s   of a drain that goes on
    trouble           why it does not get on and tries again; empty while it does
    """

    state: DaemonState
    reason: str
    activity: str
    progress: LoadProgress | None
    span: BlockSpan | None
    num_blocks: int
    model: str
    sessions: int
    cache_used: float
    deadline_left_s: float | None
    trouble: str = ""
    num_online: int = 0


def describe(now: Situation) -> str:
    """One line, the most important first."""
    if now.state is DaemonState.ONLINE:
        share = f"{now.cache_used:.0%} of the cache used"
        return f"Serving blocks {now.span} of {now.num_blocks} of {now.model}: {_sessions(now.sessions)}, {share}"
    if now.state is DaemonState.DRAINING:
        left = "" if now.deadline_left_s is None else f", {now.deadline_left_s:.0f} s to the deadline"
        return f"Draining: {_sessions(now.sessions)} left{left}"
    if now.state is DaemonState.DRAINED:
        return "Drained: serves nobody until it is resumed or stopped"
    if now.trouble and now.state in _ON_THE_WAY:
        online = _online(now) if now.state is DaemonState.LOADING else ""
        return f"{now.state.value.capitalize()}: {online}{now.trouble}; it is tried again"
    if now.state is DaemonState.LOADING and now.progress is not None:
        return f"Loading blocks {now.span}: {_online(now)}{_progress(now.progress)}"
    if now.state in _ON_THE_WAY:
        progress = "" if now.progress is None else f": {_progress(now.progress)}"
        return f"{now.state.value.capitalize()}: {now.activity}{progress}"
    return f"{now.state.value.capitalize()}: {now.reason}" if now.reason else now.state.value.capitalize()


def _online(now: Situation) -> str:
    """How much of a span that is loaded serves already."""
    if now.span is None or not now.num_online:
        return ""
    return f"{now.num_online} of {len(now.span)} online, {_sessions(now.sessions)}, "


def _sessions(count: int) -> str:
    return "1 session" if count == 1 else f"{count} sessions"


def _progress(progress: LoadProgress) -> str:
    if progress.stage == "fetch":
        done, total = (f"{size / 2**20:.0f}" for size in (progress.done, progress.total))
        return f"{progress.item}, {done} of {total} MiB, {progress.percent} %"
    return f"{progress.item}, {progress.done} of {progress.total} done, {progress.percent} %"
