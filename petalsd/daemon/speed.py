"""How fast we say we are: configured, or measured on this machine and followed from then on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import structlog
import torch

from petalsd.config import Config
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.sizing import network_rps
from petalsd.engine.engine import Engine
from petalsd.engine.live_rates import LiveRates
from petalsd.engine.runners import RunnerFactory
from petalsd.engine.throughput import BlockRates, RateCache, measure, measure_served, rate_key
from petalsd.errors import DeadlineExceeded, OutOfPages, Overloaded
from petalsd.log import error_fields
from petalsd.models.block import TransformerBlock
from petalsd.models.block_config import BlockConfig
from petalsd.models.contract import Angles, Block
from petalsd.models.ladder import Ladder
from petalsd.models.rope import Rope
from petalsd.models.weights import assemble_block, block_tensors
from petalsd.paths import InstancePaths
from petalsd.status import NetworkSource, RateSource
from petalsd.swarm.link import LinkMeter
from petalsd.swarm.protocol import announced_throughput

log = structlog.get_logger(__name__)

# Another process of this instance may be at its own measurement; one takes some ten seconds.
_MEASURE_TIMEOUT_S = 120.0
_WEIGHTS_SCALE = 0.02
# Less than this is no news: what is learnt from requests and transfers varies.
_RATE_CHANGE, _NETWORK_CHANGE = 0.05, 0.2


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens/s. A configured throughput stands alone; clients then assume the others.

    throughput     configured number, None when the others are measured
    inference_rps  through one block, one token at a time with cache
    forward_rps    through one block, in passes of 1024 tokens
    network_rps    through the network link
    """

    throughput: float | None = None
    inference_rps: float | None = None
    forward_rps: float | None = None
    network_rps: float | None = None
    source: RateSource = "configured"
    network_source: NetworkSource | None = None

    @property
    def are_known(self) -> bool:
        return self.throughput is not None or self.forward_rps is not None

    def announced(self, num_blocks: int, *, is_relayed: bool) -> float:
        """The number by which the swarm compares servers of ``num_blocks`` blocks."""
        if self.throughput is not None:
            return self.throughput
        if self.forward_rps is None or self.network_rps is None:
            raise ValueError("rates are either configured or measured")
        return announced_throughput(self.forward_rps, self.network_rps, num_blocks, is_relayed=is_relayed)


class _Steady:
    """Holds a value until another one differs from it by a share of it."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._held = math.nan

    def __call__(self, value: float) -> float:
        if not abs(value - self._held) <= self._share * self._held:
            self._held = value
        return self._held


class Speed:
    """``rates`` are known once ``find_out`` has returned, and follow what ``live`` and ``link`` see then.

    ``runners`` make what a random block is measured with; as in ``throughput.measure``.
    """

    def __init__(
        self,
        plan: ServingPlan,
        config: Config,
        paths: InstancePaths,
        runners: RunnerFactory,
        live: LiveRates,
        link: LinkMeter,
    ) -> None:
        self._plan = plan
        self._runners = runners
        self._section = config.swarm
        self._num_threads = config.engine.threads
        self._cache = RateCache(paths.throughput_file)
        self._live = live
        self._link = link
        self._steady_mbps = _Steady(_NETWORK_CHANGE)
        self._steady_inference, self._steady_forward = _Steady(_RATE_CHANGE), _Steady(_RATE_CHANGE)
        self._measured_on: RateSource | None = None

    @property
    def rates(self) -> Rates:
        """As they are now; unknown before ``find_out``."""
        if self._section.throughput != "auto":
            return Rates(throughput=float(self._section.throughput))
        if self._measured_on is None:
            return Rates()
        blocks, (mbps, network_source) = self._live.rates(), self._network()
        return Rates(
            inference_rps=self._steady_inference(blocks.inference_rps),
            forward_rps=self._steady_forward(blocks.forward_rps),
            network_rps=network_rps(mbps, self._plan.model.hidden_size),
            source="live" if self._live.is_live else self._measured_on,
            network_source=network_source,
        )

    async def find_out(self) -> None:
        """What is known of blocks that were served before, else measure a random one; both is done once."""
        if self._section.throughput != "auto":
            return
        if known := self._cache.get(self._key("served")):
            self._begin(known, "served")
            return
        sample = await self._cache.get_or_measure(
            self._key("sample"), self._measure_sample, _MEASURE_TIMEOUT_S
        )
        self._begin(sample, "sample")

    async def find_out_of(self, engine: Engine) -> None:
        """Measure the blocks that ``engine`` serves, unless that was done before, or clients are there already.

        EngineError when they cannot compute.
        """
        if self._section.throughput != "auto" or self._measured_on == "served" or engine.stats().sessions:
            return
        try:
            measured = await self._cache.get_or_measure(
                self._key("served"), lambda: measure_served(engine), _MEASURE_TIMEOUT_S
            )
        except (DeadlineExceeded, Overloaded, OutOfPages) as error:
            log.warning("served_blocks_not_measured", **error_fields(error))
        else:
            self._begin(measured, "served")

    def _begin(self, measured: BlockRates, measured_on: RateSource) -> None:
        self._live.begin(measured)
        self._steady_inference, self._steady_forward = _Steady(_RATE_CHANGE), _Steady(_RATE_CHANGE)
        self._measured_on = measured_on
        log.info("throughput_known", **asdict(self.rates))

    def _key(self, measured_on: RateSource) -> str:
        plan = self._plan
        graphs = " in captured graphs" if plan.has_graphs else ""
        form = f"{plan.form_name}, {measured_on} blocks{graphs}"
        return rate_key(plan.source.source, form, plan.device, self._num_threads)

    def _network(self) -> tuple[float, NetworkSource]:
        """Mbit/s."""
        if self._section.network_mbps != "auto":
            return float(self._section.network_mbps), "configured"
        speed = self._link.speed()
        return self._steady_mbps(speed.mbps), "measured" if speed.is_measured else "assumed"

    async def _measure_sample(self) -> BlockRates:
        plan = self._plan
        log.info("measuring_throughput", device=str(plan.device), form=plan.form_name)
        block, angles = random_block(plan, self._num_threads)
        return await measure({0: block}, angles, self._runners, stored=plan.geometry.stored)


def random_block(plan: ServingPlan, num_threads: int) -> tuple[Block, Angles]:
    """A block with the shapes of the plan's model: speed does not depend on the weights, so none are fetched."""
    fused = plan.architecture.fused
    if fused is None:
        ladder = Ladder(plan.architecture, plan.source, plan.storage, num_threads)
        return ladder.random_layer(0), ladder.angles
    rope = Rope(fused, plan.dtype, plan.device)
    return _random_fused_block(plan, fused, rope), rope


def _random_fused_block(plan: ServingPlan, model: BlockConfig, rope: Rope) -> TransformerBlock:
    shapes = block_tensors(model, 0)

    def random(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name], dtype=plan.dtype, device=plan.device)
        return tensor.normal_(0.0, _WEIGHTS_SCALE)

    return TransformerBlock(0, model, assemble_block(random, model, 0, plan.storage), rope)
