"""A daemon of fakes that is measured as a real one is: every metric has its source and its series."""

from __future__ import annotations

import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from petalsd.config_loading import load_config
from petalsd.daemon.disks import Disks
from petalsd.daemon.figures import Figures
from petalsd.daemon.plan import ServingPlan, make_plan
from petalsd.daemon.recording import (
    CacheRecorder,
    DownloadRecorder,
    EngineRecorder,
    SwarmRecorder,
    declare_causes,
)
from petalsd.daemon.speed import Rates
from petalsd.engine.iteration_cost import AttentionShare
from petalsd.engine.live_rates import LiveRates
from petalsd.metrics import Metrics
from petalsd.paths import InstancePaths
from petalsd.swarm.link import LinkMeter
from petalsd.systemd import Notifier
from tests.daemon.fakes import Stage
from tests.daemon.placement_checks import MOVE, staying

# (name, sorted labels) to value.
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class MeasuredStage(Stage):
    """``model_dir`` holds the model that the daemon is said to serve; ``home`` is its place on the disk."""

    def __init__(self, model_dir: Path, home: Path, *overrides: str) -> None:
        super().__init__("blocks.span=0:2", *overrides)
        self.plan = plan_of(model_dir, home)
        self.notifier = Notifier()
        declare_causes(self.metrics)
        self.engine_recorder = EngineRecorder(self.metrics, LiveRates(AttentionShare()))
        self.cache_recorder = CacheRecorder(self.metrics)
        self.swarm_recorder = SwarmRecorder(self.metrics, LinkMeter())
        self.download_recorder = DownloadRecorder(self.metrics)
        paths = _paths(home)
        self.disks = Disks({"state": paths.state_dir, "cache": paths.cache_dir})
        figures = Figures(self.daemon, self.daemon._parts, self.plan, self.disks, self.notifier)
        self.metrics.read_from(figures.read)
        self.metrics.read_from(self.placement.read)

    async def let_all_happen(self) -> None:
        """After it every family has a series."""
        await self.disks.look()
        self.notifier.watchdog()
        self.engine.last_step_s = time.monotonic()
        self.rates = Rates(None, 50.0, 400.0, 200.0, "live", "measured")
        self.placement.checked(MOVE)
        self.placement.checked(staying(MOVE.target, 13.0))

    def value(self, name: str, **labels: str) -> float | None:
        """The value of one series as a scraper reads it; None when it is absent."""
        return read(self.metrics).get((name, tuple(sorted(labels.items()))))


def read(metrics: Metrics) -> Series:
    return parse(metrics.exposition())


def parse(exposition: bytes) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
    }


def total(series: Series, name: str, **labels: str) -> float:
    """The sum over all series of the family that have these labels."""
    return sum(
        value
        for (one, its), value in series.items()
        if one == f"petalsd_{name}" and labels.items() <= dict(its).items()
    )


def plan_of(model_dir: Path, home: Path) -> ServingPlan:
    overrides = [f"model.source={model_dir}", "engine.device=cpu", "model.dtype=float32"]
    return make_plan(load_config(None, {}, overrides).config, _paths(home))


def _paths(home: Path) -> InstancePaths:
    return InstancePaths("t", home, home / "cache")
