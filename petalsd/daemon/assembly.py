"""Builds a daemon from a configuration and runs it: the one place that knows all the real parts."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from functools import partial

import structlog

from petalsd.config import Config
from petalsd.daemon.activity import Activity
from petalsd.daemon.announcement import VERSION, RecordWriter
from petalsd.daemon.attendants import Attendants
from petalsd.daemon.components import Parts
from petalsd.daemon.daemon import Daemon
from petalsd.daemon.detached import run_detached
from petalsd.daemon.directories import make_directories
from petalsd.daemon.installation import Installation
from petalsd.daemon.membership import Membership
from petalsd.daemon.memory import device_memory_bytes
from petalsd.daemon.node_options import node_options
from petalsd.daemon.placement_record import PlacementRecord
from petalsd.daemon.plan import Demand, ModelReader, ServingPlan, demand_for, make_plan, size_text
from petalsd.daemon.prefix_room import prefix_cache_bytes
from petalsd.daemon.rebalancer import Rebalancer
from petalsd.daemon.recording import (
    CacheRecorder,
    DownloadRecorder,
    EngineRecorder,
    SwarmRecorder,
    declare_causes,
)
from petalsd.daemon.settings import Settings
from petalsd.daemon.signals import Signals
from petalsd.daemon.span_limit import SpanLimit
from petalsd.daemon.span_loader import LoadProgress, ProgressLog, ProgressSink, SpanLoader
from petalsd.daemon.speed import Speed
from petalsd.daemon.spilling import plan_spill
from petalsd.daemon.supervisor import Supervisor
from petalsd.daemon.warnings import WarningBoard
from petalsd.engine.captures import Capturing
from petalsd.engine.engine import Engine
from petalsd.engine.graphs import CudaGraphs
from petalsd.engine.iteration_cost import AttentionShare
from petalsd.engine.live_rates import LiveRates
from petalsd.engine.observer import NullObserver
from petalsd.engine.runners import RunnerFactory
from petalsd.engine.throughput import MEASURE_LIMITS
from petalsd.errors import ConfigError
from petalsd.kvcache.pool import KVPool
from petalsd.kvcache.prefixes import PrefixCache
from petalsd.kvcache.spill import SpillArea
from petalsd.kvcache.waiting import AdmissionRules
from petalsd.log import adopt_loggers
from petalsd.metrics import Metrics
from petalsd.models.ladder import Ladder
from petalsd.models.references import ReferenceStore
from petalsd.ops.threads import fit_threads_to_quota
from petalsd.paths import InstancePaths
from petalsd.swarm.announcer import AnnouncerOptions
from petalsd.swarm.link import LinkMeter
from petalsd.swarm.serving import HandlerLimits, ServedModel, Serving
from petalsd.systemd import Notifier

log = structlog.get_logger(__name__)

_LIBRARIES = ("hivemind", "transformers", "huggingface_hub")


async def serve(config: Config, paths: InstancePaths, read: Callable[[], Config], notifier: Notifier) -> None:
    """Run until a stop signal; ``read`` loads the configuration again for a reload."""
    adopt_loggers(_LIBRARIES)
    fit_threads_to_quota()
    with Signals() as signals:
        notifier.status("Starting: reading the model's configuration")
        plan = await _plan_unless_stopped(config, paths, signals)
        if plan is not None:
            parts = build_parts(config, plan, paths, read)
            daemon = Daemon(parts, signals)
            async with Attendants(daemon, parts, plan, paths, notifier).attending(signals):
                await daemon.run()
    log.info("stopped")


async def _plan_unless_stopped(config: Config, paths: InstancePaths, signals: Signals) -> ServingPlan | None:
    """The model's config may come slowly from the Hub; a stop does not wait for it."""
    make_directories(paths)
    planning = asyncio.create_task(run_detached(lambda _: make_plan(config, paths), "petalsd-plan"))
    stop = asyncio.create_task(signals.stop.wait())
    await asyncio.wait({planning, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if planning.done():
        return planning.result()
    planning.cancel()
    return None


def build_parts(config: Config, plan: ServingPlan, paths: InstancePaths, read: Callable[[], Config]) -> Parts:
    """Constructs everything and starts nothing. ConfigError when the blocks asked for cannot be served."""
    board, activity, metrics = WarningBoard(instance=paths.instance), Activity(), Metrics()
    declare_causes(metrics)
    _warn_of_tight_memory(plan, demand_for(plan, config.blocks), board)
    settings = Settings(config, read, lambda new: demand_for(plan, new.blocks))
    rng = random.Random()
    limit = SpanLimit(plan.need, lambda: device_memory_bytes(plan.device), board)
    demand = partial(_demand, plan, settings, limit)
    live = LiveRates(AttentionShare.of(plan.model))
    num_threads, turn = config.engine.threads, threading.Lock()
    capturing = _capturing(plan, turn)
    engine = _engine(plan, num_threads, EngineRecorder(metrics, live), capturing, board)
    ladder = _ladder(plan, paths, num_threads)
    link, prefixes = LinkMeter(), _prefixes(config)
    measuring = RunnerFactory(plan.device, num_threads, MEASURE_LIMITS, NullObserver(), capturing)
    speed = Speed(plan, config, paths, measuring, live, link)
    max_blocks = partial(_max_blocks, settings, demand)
    member = Membership(
        node_options(config.swarm, paths, plan.model.num_blocks),
        AnnouncerOptions(plan.prefix, plan.model.num_blocks, plan.repository, config.swarm.update_period_s),
        _serving(engine, plan, config, SwarmRecorder(metrics, link), prefixes),
        RecordWriter(plan, engine, speed, config.swarm.public_name, max_blocks).describe,
    )

    start_progress = partial(_start_progress, activity, metrics)
    loader = SpanLoader(ModelReader(plan, ladder, turn), start_progress, board, metrics)
    placement = PlacementRecord(metrics)
    metrics.read_from(placement.read)
    rebalancer = Rebalancer(
        member,
        rng,
        lambda num_blocks: speed.rates.announced(num_blocks, is_relayed=member.is_relayed),
        lambda: loader.seconds_per_block,
        placement,
    )
    make_pool = partial(_make_pool, config, plan, paths, CacheRecorder(metrics))
    installation = Installation(plan, engine, ladder.angles, make_pool, speed.find_out_of, demand)
    return Parts(
        instance=paths.instance,
        engine=engine,
        prefixes=prefixes,
        member=member,
        loader=loader,
        rebalancer=rebalancer,
        supervisor=Supervisor(engine, member, rebalancer, lambda: settings.config.blocks, demand, rng, board),
        settings=settings,
        prepare=speed.find_out,
        install=installation.install,
        exchange=installation.exchange,
        has_pages=installation.has_pages,
        has_room=plan.has_room_beside,
        demand=demand,
        limit=limit,
        rates=lambda: speed.rates,
        choices=lambda: list(ladder.choices.values()),
        board=board,
        metrics=metrics,
        activity=activity,
    )


def _ladder(plan: ServingPlan, paths: InstancePaths, num_threads: int) -> Ladder:
    references = ReferenceStore(paths.references_dir)
    return Ladder(plan.architecture, plan.source, plan.storage, num_threads, references)


def _capturing(plan: ServingPlan, turn: threading.Lock) -> Capturing | None:
    """Half of what passes need stays free: other blocks' graphs take a little more or less than was measured."""
    if not plan.has_graphs:
        return None
    return Capturing(CudaGraphs(plan.device), plan.need.reserve_bytes // 2, turn)


def _engine(
    plan: ServingPlan,
    num_threads: int,
    recorder: EngineRecorder,
    capturing: Capturing | None,
    board: WarningBoard,
) -> Engine:
    on_settled = partial(board.note, "graphs_failed")
    runners = RunnerFactory(plan.device, num_threads, plan.limits, recorder, capturing, on_settled)
    return Engine(plan.limits, plan.device, num_threads, recorder, runners)


def _demand(plan: ServingPlan, settings: Settings, limit: SpanLimit) -> Demand:
    return demand_for(plan, settings.config.blocks, limit.most)


def _max_blocks(settings: Settings, demand: Callable[[], Demand]) -> int | None:
    """What others may reckon with; None where nothing but the configuration changes how many blocks are served."""
    wanted, never_moves = demand(), settings.config.blocks.balance_quality == 0
    return None if never_moves or not wanted.may_be_fewer else wanted.num_blocks


def _start_progress(activity: Activity, metrics: Metrics) -> ProgressSink:
    sinks = (ProgressLog(), activity.loading, DownloadRecorder(metrics))

    def report(progress: LoadProgress) -> None:
        for sink in sinks:
            sink(progress)

    return report


def _make_pool(
    config: Config,
    plan: ServingPlan,
    paths: InstancePaths,
    recorder: CacheRecorder,
    num_pages: int,
    num_blocks: int,
) -> KVPool:
    rules = AdmissionRules(max_peer_share=config.engine.max_peer_share)
    spill = _spill_area(config, plan, paths, num_blocks)
    return KVPool(plan.geometry, num_pages, plan.dtype, plan.device, rules, spill, recorder)


def _spill_area(config: Config, plan: ServingPlan, paths: InstancePaths, num_blocks: int) -> SpillArea | None:
    """A disk without room is no reason not to serve; ``petalsd check`` is stricter."""
    try:
        spill = plan_spill(config.engine, plan, paths, num_blocks)
    except (ConfigError, OSError) as error:
        log.error("kv_spill_unavailable", error=str(error))
        return None
    log.info("kv_spill_planned", plan=spill.summary)
    return spill.area


def _prefixes(config: Config) -> PrefixCache:
    """Too little memory for it is no reason not to serve; ``petalsd check`` is stricter."""
    try:
        return PrefixCache(prefix_cache_bytes(config.engine))
    except ConfigError as error:
        log.error("prefix_cache_unavailable", error=str(error))
        return PrefixCache(0)


def _warn_of_tight_memory(plan: ServingPlan, demand: Demand, board: WarningBoard) -> None:
    """Blocks that were asked for by number are tried; ``petalsd check`` is stricter."""
    need_bytes = plan.need.of_blocks(demand.num_blocks)
    if need_bytes > plan.memory_bytes:
        need, there = size_text(need_bytes), size_text(plan.memory_bytes)
        board.set("memory_tight", f"{demand.num_blocks} blocks take {need}, there are {there}")


def _serving(
    engine: Engine, plan: ServingPlan, config: Config, recorder: SwarmRecorder, prefixes: PrefixCache
) -> Serving:
    model = ServedModel(plan.prefix, plan.model.num_blocks, plan.model.hidden_size, plan.dtype, VERSION)
    limits = HandlerLimits(
        request_timeout_s=config.engine.request_timeout_s,
        step_timeout_s=config.engine.step_timeout_s,
        session_timeout_s=config.engine.session_timeout_s,
    )
    return Serving(engine, model, limits, recorder, config.swarm.allowed_peers, prefixes)
