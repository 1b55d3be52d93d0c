"""What is measured: the name, type, labels and meaning of every metric, and the text that Prometheus scrapes.

Counters and histograms are kept here, as ``instruments``. Gauges are not: a scrape reads them from whoever knows,
so that nothing is known twice. Labels take few values, all known beforehand, and never name a peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from petalsd.instruments import Counter, Histogram

PREFIX = "petalsd_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds of the buckets. A decode step takes a fraction of a millisecond to a second, a long prefill minutes.
_LATENCY_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WAIT_S = (0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600)
_LOAD_S = (0.1, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Family:
    """A metric without its prefix. ``kind``: "gauge", "counter" or "histogram", which alone has ``buckets``."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _gauge(name: str, help: str, *labels: str) -> Family:
    return Family(name, "gauge", help, labels)


def _counter(name: str, help: str, *labels: str) -> Family:
    return Family(name, "counter", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Family:
    return Family(name, "histogram", help, labels, buckets)


CATALOGUE: dict[str, tuple[Family, ...]] = {
    "Service": (
        _gauge("build_info", "Always 1; the labels say what runs", "version", "python_version", "torch_version"),
        _gauge(
            "model_info", "Always 1; the labels say what is served, and on what",
            "model", "family", "dtype", "quantization", "device",
        ),
        _gauge("state", "1 for the state of its life cycle that the daemon is in, 0 for the others", "state"),
        _gauge("state_age_seconds", "Time since the daemon entered that state"),
        _gauge("warning_active", "1 while this warning is raised, else 0", "code", "severity"),
        _gauge("watchdog_interval_seconds", "How often the watchdog must be satisfied"),
        _gauge("watchdog_ping_age_seconds", "Time since the daemon last proved to the watchdog that it works"),
        _gauge("engine_step_age_seconds", "Time since the device last finished anything, self-tests included"),
        _gauge("engine_busy_seconds", "How long the device has been at the batch that it computes now; 0: idle"),
        _gauge("disk_free_bytes", "Room on the disk that holds this directory of the daemon", "directory"),
        _counter("drains_total", "Drains that were begun, before a stop and on request"),
        _counter("drain_abandoned_total", "Sessions and passes that a drain could not wait for"),
    ),
    "Load": (
        _gauge("sessions", "Open sessions"),
        _gauge("session_rows", "Sequences that count towards the limit: B for a session of batch size B"),
        _gauge("session_rows_limit", "How many sequences may be open at once"),
        _gauge("queued_passes", "Forward and backward passes that are waited for"),
        _counter("steps_total", "Answered steps of sessions, by whether they brought one token or more", "phase"),
        _counter("tokens_total", "Tokens computed in steps, over all sequences", "phase"),
        _counter("passes_total", "Answered passes without a cache", "direction"),
        _counter("pass_tokens_total", "Tokens of the answered passes, over all sequences", "direction"),
        _histogram("batch_rows", "Sequences that the device computed at once in steps", _POWERS_OF_TWO),
        _histogram("batch_tokens", "Tokens that the device computed at once in steps", _POWERS_OF_TWO),
        _histogram(
            "prefill_chunk_tokens", "Tokens of prefill that a batch took along beside decode", _POWERS_OF_TWO
        ),
    ),
    "Captured graphs": (
        _gauge("graphs", "Captured steps of blocks, over all sizes of batches; 0 where steps are not captured"),
        _gauge("graphs_wanted", "How many there are to be; more than there are while new blocks are captured"),
        _gauge("graph_memory_bytes", "Memory of the device that they take"),
        _counter(
            "graph_runs_total",
            "Runs of blocks in steps, by whether graphs were replayed or their kernels launched one by one",
            "outcome",
        ),
    ),
    "Latency": (
        _histogram("batch_seconds", "What the device took for one batch of steps", _LATENCY_S),
        _histogram("step_seconds", "From handing a step to the engine to its answer", _LATENCY_S, "phase"),
        _histogram(
            "step_queue_seconds", "The part of it that the step waited for its first token to be computed",
            _LATENCY_S, "phase",
        ),
        _histogram("pass_seconds", "From handing a pass to the engine to its answer", _LATENCY_S, "direction"),
        _histogram(
            "pass_queue_seconds", "The part of it that the pass waited until it was begun",
            _LATENCY_S, "direction",
        ),
        _histogram(
            "session_admission_seconds", "What admitted sessions waited for room in the attention cache", _WAIT_S
        ),
        _histogram(
            "first_answer_seconds", "From the request for a session to the first answer sent in it", _LATENCY_S
        ),
    ),
    "Attention cache": (
        _gauge("kv_capacity_pages", "Pages of the attention cache in memory; 0 while no blocks are served"),
        _gauge("kv_promisable_pages", "Pages that sessions can be promised in all, with those of the spill file"),
        _gauge("kv_reserved_pages", "Pages promised to open sessions, those that hold tokens included"),
        _gauge("kv_mapped_pages", "Pages in memory that hold tokens"),
        _gauge("kv_mapped_peak_pages", "The most of them since these blocks are served"),
        _gauge("kv_free_pages", "Pages in memory that hold nothing, promised or not"),
        _gauge("kv_spilled_pages", "Pages that hold tokens of idle sessions in the spill file alone"),
        _gauge("kv_shared_pages", "Pages that hold tokens of several sequences of a session"),
        _gauge("kv_tail_tokens", "Places for a token in a block that are held and empty: ends of last pages"),
        _gauge("kv_page_tokens", "Tokens of one sequence in one block that a page holds"),
        _gauge("kv_spill_file_bytes", "Disk space that the spill file takes"),
        _gauge("kv_spill_host_bytes", "Page-locked memory that pages of idle sessions of a GPU take"),
        _gauge("prefix_cache_bytes", "Host memory that kept beginnings of prompts take"),
        _counter(
            "prompt_tokens_total", "Tokens that sessions began with: computed, or reused from the prefix cache",
            "source",
        ),
        _gauge("waiting_sessions", "Sessions that wait for pages"),
        _gauge("waiting_session_age_seconds", "How long the first of them has waited; 0: nobody does"),
        _counter(
            "kv_copied_pages_total", "Pages copied: before a write to shared ones, and to make room in one piece",
            "cause",
        ),
        _counter("kv_spilled_bytes_total", "Pages of idle sessions written to the spill file"),
        _counter("kv_restored_bytes_total", "Pages read back from it for the next step of their session"),
        _histogram("kv_spill_seconds", "Writing the pages that make room for a batch", _LATENCY_S),
        _histogram("kv_restore_seconds", "Reading the pages of a session back", _LATENCY_S),
        _counter("kv_spill_failures_total", "Times that the spill file could not be made, written or read"),
    ),
    "Calls": (
        _counter("rpc_calls_total", "Calls that came from other peers", "method"),
        _counter("rpc_errors_total", "Calls that were answered with an error", "method", "code"),
        _counter("rpc_abandoned_total", "Streams whose caller left before the call was over", "method"),
        _gauge("open_streams", "Open streams of calls"),
        _counter("wire_received_bytes_total", "Messages of other peers, without what libp2p adds"),
        _counter("wire_sent_bytes_total", "Messages to other peers, without what libp2p adds"),
        _gauge("wire_held_bytes", "Large messages that are being received or computed on"),
        _counter(
            "hand_overs_total", "Sessions that other servers offered, and what became of those that were taken",
            "outcome",
        ),
        _gauge("awaited_sessions", "Sessions of other servers that wait here for their clients, or arrive"),
        _gauge("awaited_pages", "Pages of the attention cache promised to them, at the cost of their givers"),
        _counter("pushes_total", "Answers handed on to the next server of a chain", "outcome"),
    ),
    "Swarm": (
        _gauge("dht_in_touch", "1 while the daemon is a member of the swarm and some peer answers, else 0"),
        _gauge("dht_known_peers", "Peers in the routing table of the DHT"),
        _gauge("dht_stored_keys", "Keys of the swarm's directory that this node keeps for everybody"),
        _gauge("dht_ghosts", "Servers in the directory that went without a goodbye, as far as pings showed"),
        _gauge("dht_announced_state", "1 for the state that the swarm was last told, 0 for the others", "state"),
        _gauge("dht_announcement_age_seconds", "Time since our records were last stored"),
        _counter("dht_announcements_total", "Attempts to store our records", "outcome"),
        _gauge("model_blocks", "Blocks of the whole model"),
        _gauge("span_start_block", "First block of our span; absent while there is none"),
        _gauge("span_end_block", "First block after our span; absent while there is none"),
        _gauge("span_blocks", "Blocks of our span, also while they are being loaded; 0 while there is none"),
        _gauge("announced_tokens_per_second", "Throughput that we announce; absent until it is known"),
        _gauge(
            "block_tokens_per_second",
            "What we announce of a block: one token at a time, or passes; absent where a number is configured",
            "kind",
        ),
        _gauge("network_tokens_per_second", "What we announce of the network link; absent as above"),
        _gauge("rate_source", "1 for where the rates of a block and of the link come from", "of", "source"),
        _gauge("loaded_blocks", "Blocks whose weights are in memory"),
        _counter("rebalances_total", "Times that the daemon left blocks, or was made anew, by cause", "cause"),
        _counter("placement_checks_total", "Times that the placement was checked, by what came of it", "verdict"),
        _gauge(
            "move_gain_tokens_per_second",
            "What the last move by the rule was to win for the swarm's weakest block, and what that block had won "
            "by the next check, others' moves included; absent before the first",
            "kind",
        ),
        _counter("moves_total", "Times that it came to serve another span than before"),
        _histogram("load_seconds", "Loading the missing blocks of a span, retries included", _LOAD_S),
        _counter("load_failures_total", "Attempts to load blocks that failed and were made again"),
        _counter("fetched_bytes_total", "Weights downloaded"),
    ),
}  # fmt: skip

FAMILIES = {family.name: family for families in CATALOGUE.values() for family in families}


class Reading(NamedTuple):
    """The value of a gauge now. ``labels`` are the values, in the order of the family's names."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


Source = Callable[[], Iterable[Reading]]


class Metrics:
    """One daemon's metrics. Whoever records asks once for the instrument; KeyError: there is none of that name.

    Each series is recorded on one thread. Sources are asked on the thread that calls ``exposition``.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters = {
            family.name: Counter(family.labels) for family in FAMILIES.values() if family.kind == "counter"
        }
        self._histograms = {
            family.name: Histogram(family.labels, family.buckets)
            for family in FAMILIES.values()
            if family.kind == "histogram"
        }
        self._gauges = _Gauges()
        self._registry.register(_Recorded(self._counters, self._histograms))
        self._registry.register(self._gauges)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def counter(self, name: str) -> Counter:
        """The counter of that name; ``labels(...)`` of one with labels makes a series, from then on at 0."""
        return self._counters[name]

    def histogram(self, name: str) -> Histogram:
        return self._histograms[name]

    def read_from(self, source: Source) -> None:
        """Ask ``source`` for the values of gauges at every scrape."""
        self._gauges.sources.append(source)

    def exposition(self) -> bytes:
        """Everything, as ``CONTENT_TYPE`` has it. What a source raises comes through."""
        return generate_latest(self._registry)


class _Recorded(Collector):
    """The instruments as they are at a scrape."""

    def __init__(self, counters: Mapping[str, Counter], histograms: Mapping[str, Histogram]) -> None:
        self._counters = counters
        self._histograms = histograms

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES.values():
            if family.kind == "counter":
                yield self._counter(family)
            elif family.kind == "histogram":
                yield self._histogram(family)

    def _counter(self, family: Family) -> Metric:
        metric = CounterMetricFamily(PREFIX + family.name, family.help, labels=family.labels)
        for values, series in self._counters[family.name].series():
            metric.add_metric(values, series.value)
        return metric

    def _histogram(self, family: Family) -> Metric:
        metric = HistogramMetricFamily(PREFIX + family.name, family.help, labels=family.labels)
        bounds = [*(str(float(bound)) for bound in family.buckets), "+Inf"]
        for values, series in self._histograms[family.name].series():
            buckets = list(zip(bounds, series.cumulative(), strict=True))
            metric.add_metric(values, buckets, series.sum)
        return metric


class _Gauges(Collector):
    """Asks the sources at every scrape."""

    def __init__(self) -> None:
        self.sources: list[Source] = []

    def describe(self) -> Iterable[Metric]:
        return self._empty().values()

    def collect(self) -> Iterable[Metric]:
        metrics = self._empty()
        for source in self.sources:
            for name, value, labels in source():
                if len(labels) != len(FAMILIES[name].labels):
                    raise ValueError(
                        f"{name} has the labels {FAMILIES[name].labels}, got the values {labels}"
                    )
                metrics[name].add_metric(labels, value)
        return metrics.values()

    def _empty(self) -> dict[str, GaugeMetricFamily]:
        return {
            family.name: GaugeMetricFamily(PREFIX + family.name, family.help, labels=family.labels)
            for family in FAMILIES.values()
            if family.kind == "gauge"
        }
