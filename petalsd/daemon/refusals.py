"""What an administrator cannot have now, and the command that leads on, for the instance that refuses."""

from __future__ import annotations

from petalsd.errors import Conflict, DeadlineExceeded
from petalsd.types import DaemonState

_WAYS_ONLINE = {DaemonState.DRAINED: "resume", DaemonState.DRAINING: "status"}


def cannot_move(state: DaemonState, instance: str) -> Conflict:
    verb = _WAYS_ONLINE.get(state, "wait --ready")
    return Conflict(
        f"the daemon is {state.value}: only one that is online can move",
        hint=f"petalsctl -i {instance} {verb}",
    )


def did_not_begin(what: str, seconds: float, instance: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{what} did not begin within {seconds:g} s",
        hint=f"it may still; look at petalsctl -i {instance} status",
    )
