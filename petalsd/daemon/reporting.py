"""What the daemon says about itself: the documents of the control socket, and the line of `systemctl status`."""

from __future__ import annotations

import math
import os
import time

from petalsd import __version__
from petalsd._C import PoolStats
from petalsd.daemon.activity import Situation, describe
from petalsd.daemon.components import Parts
from petalsd.daemon.daemon import Daemon
from petalsd.daemon.drain import open_work
from petalsd.daemon.peer_list import peer_entries, uncovered
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.span_loader import LoadProgress
from petalsd.engine.stats import EngineStats
from petalsd.errors import SwarmError
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.prefixes import PrefixCache
from petalsd.models.ladder import Choice, Rung
from petalsd.status import (
    Balance,
    BlockKind,
    DrainStatus,
    GraphStatus,
    KVStatus,
    LastMove,
    Loading,
    Model,
    PathTrial,
    Peers,
    PrefixStatus,
    SessionCounts,
    SessionEntry,
    Sessions,
    Span,
    SpillStatus,
    Status,
    Throughput,
    WatchdogStatus,
)
from petalsd.systemd import Notifier
from petalsd.types import DaemonState

_HINDERING = ("load_failed", "join_failed", "p2pd_failed", "engine_failed")


class Reporter:
    """Reads the parts; changes nothing and asks nobody outside this process but for ``peers``."""

    def __init__(
        self, daemon: Daemon, parts: Parts, plan: ServingPlan, instance: str, notifier: Notifier
    ) -> None:
        self._daemon = daemon
        self._parts = parts
        self._plan = plan
        self._instance = instance
        self._notifier = notifier
        self._started_s = time.monotonic()

    def line(self) -> str:
        """What it is at, in a sentence."""
        return describe(self.situation())

    def situation(self) -> Situation:
        daemon, parts, activity = self._daemon, self._parts, self._parts.activity
        state = daemon.lifecycle.state
        return Situation(
            state=state,
            reason=daemon.lifecycle.reason,
            activity=activity.text,
            progress=activity.progress,
            span=daemon.span,
            num_blocks=self._plan.model.num_blocks,
            model=self._plan.prefix,
            sessions=open_work(self._parts.engine),
            cache_used=self._cache_used(),
            deadline_left_s=self._deadline_left_s(),
            trouble=self._trouble(),
            num_online=len(parts.engine.span or ()),
        )

    def status(self) -> Status:
        daemon, parts = self._daemon, self._parts
        state = daemon.lifecycle.state
        return Status(
            version=__version__,
            instance=self._instance,
            state=state.value,
            reason=daemon.lifecycle.reason,
            summary=self.line(),
            since_s=_age(daemon.lifecycle.since_s),
            uptime_s=_age(self._started_s),
            pid=os.getpid(),
            peer_id=self._peer_id(),
            maddrs=list(parts.member.known_maddrs),
            is_relayed=parts.member.is_relayed,
            model=self._model(),
            span=None if daemon.span is None else Span.of(daemon.span),
            served_span=None if parts.engine.span is None else Span.of(parts.engine.span),
            loading=self.loading(),
            kv=self._kv(),
            graphs=_graphs(parts.engine.stats()),
            sessions=self._session_counts(),
            throughput=self._throughput(),
            balance=self._balance(),
            drain=self._drain(),
            watchdog=self._watchdog(),
            warnings=parts.board.documents(),
        )

    def sessions(self) -> Sessions:
        entries = [
            SessionEntry(
                id=f"{info.key:x}",
                peer=info.spec.peer or None,
                span=Span.of(info.spec.span),
                rows=info.spec.batch,
                position=info.position,
                max_tokens=info.spec.max_tokens,
                age_s=_age(info.opened_monotonic_s),
                idle_s=_age(info.last_active_monotonic_s),
                kv_pages=info.pages,
            )
            for info in self._parts.engine.open_sessions()
        ]
        return Sessions(sessions=entries)

    async def peers(self) -> Peers:
        """SwarmError or DeadlineExceeded when the directory cannot be read."""
        view = await self._parts.member.read_view()
        pings, own_peer = self._parts.member.pings(), self._peer_id()
        return Peers(peers=peer_entries(view, pings, own_peer), uncovered=uncovered(view.without_ghosts()))

    def loading(self) -> Loading | None:
        """None unless blocks are being loaded."""
        progress = self._parts.activity.progress
        if progress is None or self._daemon.lifecycle.state not in (
            DaemonState.LOADING,
            DaemonState.REBALANCING,
        ):
            return None
        return _loading(progress)

    def drained(self) -> tuple[float | None, int | None]:
        """Seconds to the deadline of a drain that goes on; how many sessions the deadline has ended."""
        drain = self._daemon.drain
        return self._deadline_left_s(), None if drain is None else drain.abandoned

    def _trouble(self) -> str:
        """What has gone wrong on the way to serving, the worst."""
        hindering = [one.title for one in self._parts.board.active() if one.code in _HINDERING]
        return hindering[0] if hindering else ""

    def _deadline_left_s(self) -> float | None:
        drain = self._daemon.drain
        is_draining = self._daemon.lifecycle.state in (DaemonState.DRAINING, DaemonState.REBALANCING)
        return drain.deadline_left_s if drain is not None and is_draining else None

    def _peer_id(self) -> str | None:
        try:
            return self._parts.member.peer_id
        except SwarmError:  # no member just now
            return None

    def _model(self) -> Model:
        plan, choices = self._plan, self._parts.choices()
        order = list(Rung)
        slowest = max(choices, key=lambda choice: order.index(choice.taken.rung), default=None)
        return Model(
            source=plan.source.source,
            dht_prefix=plan.prefix,
            num_blocks=plan.model.num_blocks,
            family=plan.model.model_type,
            dtype=plan.dtype_name,
            quantization=plan.storage.quantization,
            adapters=list(plan.adapter_names),
            device=str(plan.device),
            path=None if slowest is None else slowest.taken.rung.value,
            kernels=None if slowest is None else slowest.taken.kernels,
            block_kinds=[_block_kind(choice) for choice in choices],
        )

    def _kv(self) -> KVStatus | None:
        pool = self._parts.engine.pool
        if pool is None:
            return None
        stats = pool.stats()
        return KVStatus(
            pages_total=stats.pages_total,
            pages_free=stats.pages_free,
            page_tokens=pool.geometry.page_tokens,
            tokens_left=pool.tokens_free,
            pages_reserved=stats.pages_reserved,
            spill=_spill(pool, stats),
            prefixes=_prefixes(self._parts.prefixes),
        )

    def _cache_used(self) -> float:
        kv = self._kv()
        return 0.0 if kv is None else 1.0 - kv.pages_free / max(1, kv.pages_total)

    def _session_counts(self) -> SessionCounts:
        stats, pool = self._parts.engine.stats(), self._parts.engine.pool
        return SessionCounts(
            active=stats.sessions,
            limit=self._parts.settings.config.engine.max_sessions,
            rows=stats.rows,
            waiting=0 if pool is None else pool.stats().waiters,
        )

    def _throughput(self) -> Throughput | None:
        span, rates = self._daemon.span, self._parts.rates()
        if span is None or not rates.are_known:
            return None
        return Throughput(
            tokens_per_s=rates.announced(len(span), is_relayed=self._parts.member.is_relayed),
            inference_rps=rates.inference_rps,
            forward_rps=rates.forward_rps,
            network_rps=rates.network_rps,
            source=rates.source,
            network_source=rates.network_source,
        )

    def _balance(self) -> Balance:
        parts, move = self._parts, self._daemon.last_move
        next_s = parts.supervisor.next_check_monotonic_s
        return Balance(
            quality=parts.settings.config.blocks.balance_quality,
            next_check_s=None if next_s is None else max(0.0, next_s - time.monotonic()),
            last_move=None
            if move is None
            else LastMove(
                from_=Span.of(move.old), to=Span.of(move.new), at_unix_s=move.at_unix_s, reason=move.reason
            ),
            is_pinned=parts.demand().pinned is not None,
        )

    def _drain(self) -> DrainStatus | None:
        if self._daemon.lifecycle.state not in (DaemonState.DRAINING, DaemonState.DRAINED):
            return None
        deadline_left_s, abandoned = self.drained()
        left = open_work(self._parts.engine)
        return DrainStatus(sessions_left=left, deadline_left_s=deadline_left_s, abandoned=abandoned)

    def _watchdog(self) -> WatchdogStatus:
        ping_s, step_s = (
            self._notifier.last_ping_monotonic_s,
            self._parts.engine.stats().last_step_monotonic_s,
        )
        return WatchdogStatus(
            interval_s=self._notifier.watchdog_interval_s,
            last_ping_s=None if ping_s is None else _age(ping_s),
            engine_last_step_s=_age(step_s) if step_s else None,
        )


def _age(since_monotonic_s: float) -> float:
    return round(time.monotonic() - since_monotonic_s, 3)


def _block_kind(choice: Choice) -> BlockKind:
    trials = [
        PathTrial(
            path=trial.rung.value,
            kernels=trial.kernels,
            error=trial.error if math.isfinite(trial.error) else None,
            tolerance=trial.tolerance,
            is_passed=trial.is_passed,
            duration_s=round(trial.duration_s, 4),
        )
        for trial in choice.trials
    ]
    return BlockKind(kind=choice.kind, trials=trials)


def _spill(pool: KVPool, stats: PoolStats) -> SpillStatus | None:
    area = pool.spill_area
    if area is None:
        return None
    return SpillStatus(
        max_bytes=area.max_bytes,
        file_bytes=pool.spill_bytes,
        pages_promisable=stats.pages_promisable,
        pages_spilled=stats.pages_spilled,
    )


def _prefixes(cache: PrefixCache) -> PrefixStatus | None:
    if not cache.max_bytes:
        return None
    return PrefixStatus(
        max_bytes=cache.max_bytes,
        bytes=cache.nbytes,
        tokens_seen=cache.tokens_seen,
        tokens_reused=cache.tokens_reused,
    )


def _graphs(stats: EngineStats) -> GraphStatus | None:
    if not stats.graphs_wanted:
        return None
    return GraphStatus(
        captured=stats.graphs,
        wanted=stats.graphs_wanted,
        memory_bytes=stats.graph_bytes,
        failure=stats.graphs_failure,
    )


def _loading(progress: LoadProgress) -> Loading:
    is_fetch = progress.stage == "fetch"
    return Loading(
        stage="fetching" if is_fetch else "loading",
        item=progress.item,
        unit="bytes" if is_fetch else "blocks",
        done=progress.done,
        total=progress.total,
        percent=progress.percent,
    )
