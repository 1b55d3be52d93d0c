"""What is wrong right now, as a list of declared warnings: for `petalsctl status`, the journal and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from petalsd.errors import PetalsdError
from petalsd.status import ActiveWarning as WarningDocument
from petalsd.status import Severity

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Kind:
    """A warning that can be raised. ``hint``: what to do; NAME in it is the instance."""

    title: str
    severity: Severity
    hint: str


KINDS = {
    "engine_stuck": Kind(
        "the engine does not come back from its work", "critical",
        "under systemd the daemon is restarted by itself; if it comes again, look at the device (dmesg)",
    ),
    "engine_failed": Kind(
        "the engine failed its self-test", "critical",
        "it is being started anew; the journal has the error",
    ),
    "device_lost": Kind(
        "the device is lost to this process", "critical",
        "under systemd the daemon is started anew by itself; if it comes again, petalsctl -i NAME doctor reads "
        "the driver's errors",
    ),
    "loop_stuck": Kind(
        "the daemon's main loop was blocked within the last ten minutes", "critical",
        "the journal (loop_stuck) has the place where it hung; report it with that",
    ),
    "p2pd_failed": Kind(
        "the libp2p daemon died, does not answer, or is out of reach", "critical",
        "it is being replaced under the same identity; if it comes again, look for memory pressure (dmesg)",
    ),
    "swarm_unreachable": Kind(
        "no peer of the swarm answers", "critical",
        "check the network and swarm.initial_peers; they are dialled again until one answers",
    ),
    "unreachable": Kind(
        "other peers cannot dial this node", "critical",
        "have the router and the firewall let its port in; behind a NAT, name the address outside in "
        "swarm.announce_maddrs",
    ),
    "port_changes": Kind(
        "the port is another one after each start", "warning",
        "others have this node's address in their files: name a port in swarm.host_maddrs",
    ),
    "join_failed": Kind(
        "joining the swarm failed", "warning", "check that the initial peers run and the clock is right"
    ),
    "load_failed": Kind(
        "loading the blocks failed, it is tried again", "warning", "check network, disk and token"
    ),
    "move_failed": Kind(
        "moving to other blocks failed", "warning",
        "the blocks of before are served; check network, disk and memory, then: petalsctl -i NAME rebalance",
    ),
    "disk_full": Kind(
        "the disk is almost full", "critical", "make room, or bound the weights with model.max_disk_bytes"
    ),
    "memory_tight": Kind(
        "the blocks need more memory than there is for them", "warning",
        "lower blocks.count or engine.kv_tokens",
    ),
    "span_reduced": Kind(
        "fewer blocks are served than planned, the device ran out of memory", "warning",
        "end what else uses the device or lower engine.kv_tokens, then restart",
    ),
    "graphs_failed": Kind(
        "decode steps, or some of them, are launched without captured graphs", "warning",
        "everything works, steps take longer; the journal (graph_capture_failed) has the error",
    ),
    "record_missing": Kind(
        "our entry was missing from the swarm's directory", "warning",
        "it was stored again; if it comes again, check the clock of this machine",
    ),
    "reload_refused": Kind(
        "the configuration file is bad; the one before it is in force", "warning",
        "correct it, then: petalsctl -i NAME reload",
    ),
    "restart_needed": Kind(
        "the configuration file changed in keys that need a restart", "info",
        "restart the daemon when it suits; a service by: systemctl restart petalsd@NAME",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ActiveWarning:
    """A raised warning; ``detail`` says what exactly, ``since_monotonic_s`` since when, ``hint`` what to do."""

    code: str
    kind: Kind
    detail: str
    since_monotonic_s: float
    hint: str

    @property
    def title(self) -> str:
        return f"{self.kind.title}: {self.detail}" if self.detail else self.kind.title


class WarningBoard:
    """Raising twice keeps the first time; clearing what is not raised is harmless. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, instance: str = "NAME") -> None:
        self._clock = clock
        self._instance = instance
        self._active: dict[str, ActiveWarning] = {}

    def set(self, code: str, detail: str = "", hint: str = "") -> None:
        """Raise the declared warning ``code``; a new ``detail`` replaces the old one. KeyError: not declared.

        ``hint`` is for a case where more is known of what to do than in general.
        """
        kind, old = KINDS[code], self._active.get(code)
        since_s = self._clock() if old is None else old.since_monotonic_s
        hint = hint or kind.hint.replace("NAME", self._instance)
        self._active[code] = ActiveWarning(code, kind, detail, since_s, hint)
        if old is None:
            log.warning("warning_raised", code=code, title=kind.title, detail=detail, hint=hint)

    def blame(self, code: str, error: Exception, context: str = "") -> None:
        """Raise ``code`` for what ``error`` says, with its advice if it has any."""
        hint = ""
        text = str(error) or type(error).__name__
        if isinstance(error, PetalsdError):
            text, hint = f"{error.code}: {error.message}", error.hint
        self.set(code, f"{context}: {text}" if context else text, hint)

    def clear(self, *codes: str) -> None:
        for code in codes:
            if (old := self._active.pop(code, None)) is not None:
                log.info(
                    "warning_cleared", code=code, after_s=round(self._clock() - old.since_monotonic_s, 1)
                )

    def note(self, code: str, problem: str | None) -> None:
        """Raise ``code`` with what the problem is; clear it when there is none."""
        if problem is None:
            self.clear(code)
        else:
            self.set(code, problem)

    def active(self) -> list[ActiveWarning]:
        """The worst first, then the oldest."""
        order = ("critical", "warning", "info")
        return sorted(
            self._active.values(), key=lambda one: (order.index(one.kind.severity), one.since_monotonic_s)
        )

    def documents(self) -> list[WarningDocument]:
        """``active``, as the control socket says it."""
        return [
            WarningDocument(
                code=one.code,
                title=one.title,
                severity=one.kind.severity,
                since_s=round(self._clock() - one.since_monotonic_s, 3),
                hint=one.hint,
            )
            for one in self.active()
        ]
