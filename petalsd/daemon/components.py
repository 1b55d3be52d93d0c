"""Everything that the daemon owns, in one record."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from petalsd.daemon.activity import Activity
from petalsd.daemon.parts import ServingEngine, SwarmMember
from petalsd.daemon.plan import Demand
from petalsd.daemon.rebalancer import Rebalancer
from petalsd.daemon.settings import Settings
from petalsd.daemon.span_limit import SpanLimit
from petalsd.daemon.span_loader import SpanLoader
from petalsd.daemon.speed import Rates
from petalsd.daemon.supervisor import Supervisor
from petalsd.daemon.warnings import WarningBoard
from petalsd.kvcache.prefixes import PrefixCache
from petalsd.metrics import Metrics
from petalsd.models.contract import Block
from petalsd.models.ladder import Choice

Install = Callable[[Mapping[int, Block], int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that the daemon owns; made by ``assembly``.

    instance   our name, as petalsctl -i takes it
    prepare    what has to be known before the first announcement (the measured throughput)
    install    gives loaded blocks to the engine, and a fresh KV pool for so many
    exchange   gives other blocks to the engine; sessions on those that stay go on
    has_pages  whether the KV pool that there is does for so many blocks; while it is used, a small one may
    has_room   whether so many more blocks fit into memory beside those that are loaded
    demand     which blocks the configuration in force asks for
    limit      is lowered when they do not fit the device
    rates      how fast we say we are, as far as that is known
    choices    how each kind of blocks that was loaded is computed
    """

    instance: str
    engine: ServingEngine
    prefixes: PrefixCache
    member: SwarmMember
    loader: SpanLoader
    rebalancer: Rebalancer
    supervisor: Supervisor
    settings: Settings
    prepare: Callable[[], Awaitable[None]]
    install: Install
    exchange: Callable[[Mapping[int, Block]], Awaitable[None]]
    has_pages: Callable[[int], bool]
    has_room: Callable[[int], bool]
    demand: Callable[[], Demand]
    limit: SpanLimit
    rates: Callable[[], Rates]
    choices: Callable[[], Sequence[Choice]]
    board: WarningBoard
    metrics: Metrics
    activity: Activity
