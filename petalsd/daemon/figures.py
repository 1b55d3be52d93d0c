"""The gauges, read from the parts when a scrape comes. On the loop, like everything that is read here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from petalsd.daemon.components import Parts
from petalsd.daemon.daemon import Daemon
from petalsd.daemon.disks import Disks
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.speed import Rates
from petalsd.daemon.state_figures import age_s, build_reading, state_readings, watchdog_readings
from petalsd.metrics import Reading
from petalsd.status import NetworkSource, RateSource
from petalsd.swarm.protocol import ServerState
from petalsd.systemd import Notifier

_POOL_GAUGES = {
    "kv_capacity_pages": "pages_total",
    "kv_promisable_pages": "pages_promisable",
    "kv_reserved_pages": "pages_reserved",
    "kv_mapped_pages": "pages_mapped",
    "kv_mapped_peak_pages": "high_water",
    "kv_free_pages": "pages_free",
    "kv_spilled_pages": "pages_spilled",
    "kv_shared_pages": "pages_shared",
    "kv_tail_tokens": "tail_tokens",
    "waiting_sessions": "waiters",
    "waiting_session_age_seconds": "oldest_wait_s",
}  # what is read from PoolStats


class Figures:
    """``read`` is a ``metrics.Source``."""

    def __init__(
        self, daemon: Daemon, parts: Parts, plan: ServingPlan, disks: Disks, notifier: Notifier
    ) -> None:
        self._daemon = daemon
        self._parts = parts
        self._plan = plan
        self._disks = disks
        self._notifier = notifier

    def read(self) -> Iterator[Reading]:
        yield from self._identity()
        yield from state_readings(self._daemon.lifecycle, self._parts.board)
        yield from watchdog_readings(self._notifier)
        yield from self._disks.readings()
        yield from self._health()
        yield from self._load()
        yield from self._cache()
        yield from self._presence()
        yield from self._span()

    def _identity(self) -> Iterator[Reading]:
        plan, quantization = self._plan, self._plan.storage.quantization
        yield build_reading()
        what = (plan.prefix, plan.model.model_type, plan.dtype_name, quantization, str(plan.device))
        yield Reading("model_info", 1, what)

    def _health(self) -> Iterator[Reading]:
        stats = self._parts.engine.stats()
        if stats.last_step_monotonic_s:
            yield Reading("engine_step_age_seconds", age_s(stats.last_step_monotonic_s))
        busy_since_s = stats.busy_since_monotonic_s
        yield Reading("engine_busy_seconds", 0.0 if busy_since_s is None else age_s(busy_since_s))

    def _load(self) -> Iterator[Reading]:
        stats = self._parts.engine.stats()
        yield Reading("sessions", stats.sessions)
        yield Reading("session_rows", stats.rows)
        yield Reading("session_rows_limit", self._plan.limits.max_sessions)
        yield Reading("queued_passes", stats.queued_passes)

        yield Reading("graphs", stats.graphs)
        yield Reading("graphs_wanted", stats.graphs_wanted)
        yield Reading("graph_memory_bytes", stats.graph_bytes)

    def _cache(self) -> Iterator[Reading]:
        pool = self._parts.engine.pool
        stats = None if pool is None else pool.stats()
        for name, attribute in _POOL_GAUGES.items():
            yield Reading(name, getattr(stats, attribute) if stats else 0)
        yield Reading("kv_spill_file_bytes", pool.spill_bytes if pool else 0)
        yield Reading("kv_spill_host_bytes", pool.spill_host_bytes if pool else 0)
        yield Reading("prefix_cache_bytes", self._parts.prefixes.nbytes)
        yield Reading("kv_page_tokens", self._plan.geometry.page_tokens)

    def _presence(self) -> Iterator[Reading]:
        member = self._parts.member.stats()
        raised = {warning.code for warning in self._parts.board.active()}
        yield Reading("dht_in_touch", member.is_member and "swarm_unreachable" not in raised)
        yield Reading("dht_known_peers", member.known_peers)
        yield Reading("dht_stored_keys", member.stored_keys)
        yield Reading("dht_ghosts", member.num_ghosts)
        told = member.announcement
        for state in ServerState:
            yield Reading(
                "dht_announced_state", told is not None and told.state is state, (state.name.lower(),)
            )
        if told is not None:
            yield Reading("dht_announcement_age_seconds", age_s(told.at_monotonic_s))
        yield Reading("open_streams", member.open_streams)
        yield Reading("awaited_sessions", member.awaited.sessions)
        yield Reading("awaited_pages", member.awaited.pages)
        yield Reading("wire_held_bytes", member.held_bytes)

    def _span(self) -> Iterator[Reading]:
        parts, span = self._parts, self._daemon.span
        yield Reading("model_blocks", self._plan.model.num_blocks)
        yield Reading("span_blocks", 0 if span is None else len(span))
        yield Reading("loaded_blocks", len(parts.loader.blocks))
        if span is None:
            return
        yield Reading("span_start_block", span.start)
        yield Reading("span_end_block", span.end)
        rates = parts.rates()
        if rates.are_known:
            announced = rates.announced(len(span), is_relayed=parts.member.is_relayed)
            yield Reading("announced_tokens_per_second", announced)
        yield from _rate_readings(rates)


def _rate_readings(rates: Rates) -> Iterator[Reading]:
    figures = {"inference": rates.inference_rps, "forward": rates.forward_rps}
    for kind, rate in figures.items():
        if rate is not None:
            yield Reading("block_tokens_per_second", rate, (kind,))
    if rates.network_rps is not None:
        yield Reading("network_tokens_per_second", rates.network_rps)
    for source in get_args(RateSource):
        yield Reading("rate_source", rates.are_known and rates.source == source, ("block", source))
    for source in get_args(NetworkSource):
        yield Reading("rate_source", rates.network_source == source, ("network", source))
