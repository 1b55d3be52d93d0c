"""The gauges that every daemon has, whatever it does: what runs, in which state, how well."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator

import torch

from petalsd import __version__
from petalsd.daemon.lifecycle import Lifecycle
from petalsd.daemon.warnings import KINDS, WarningBoard
from petalsd.metrics import Reading
from petalsd.systemd import Notifier
from petalsd.types import DaemonState


def build_reading() -> Reading:
    return Reading("build_info", 1, (__version__, platform.python_version(), torch.__version__))


def state_readings(lifecycle: Lifecycle, board: WarningBoard) -> Iterator[Reading]:
    for state in DaemonState:
        yield Reading("state", state is lifecycle.state, (state.value,))
    yield Reading("state_age_seconds", age_s(lifecycle.since_s))
    raised = {warning.code for warning in board.active()}
    for code, kind in KINDS.items():
        yield Reading("warning_active", code in raised, (code, kind.severity))


def watchdog_readings(notifier: Notifier) -> Iterator[Reading]:
    yield Reading("watchdog_interval_seconds", notifier.proof_interval_s)
    if notifier.last_ping_monotonic_s is not None:
        yield Reading("watchdog_ping_age_seconds", age_s(notifier.last_ping_monotonic_s))


def age_s(since_monotonic_s: float) -> float:
    return max(0.0, time.monotonic() - since_monotonic_s)
