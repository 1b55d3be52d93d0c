"""How fast we say we are: configured, or measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from petalsd.config import SwarmSection
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.sizing import announced_throughput
from petalsd.errors import ConfigError
from petalsd.paths import InstancePaths


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

    def announced(self, num_blocks: int, *, is_relayed: bool) -> float:
        """The number by which the swarm compares servers of ``num_blocks`` blocks."""
        if self.throughput is not None:
            return self.throughput
        if self.forward_rps is None or self.network_rps is None:
            raise ValueError("rates are either configured or measured")
        return announced_throughput(self.forward_rps, self.network_rps, num_blocks, is_relayed=is_relayed)


class Speed:
    """``rates`` are known once ``find_out`` has returned."""

    def __init__(self, plan: ServingPlan, section: SwarmSection, paths: InstancePaths) -> None:
        self._plan = plan
        self._section = section
        self._file = paths.throughput_file
        self.rates = Rates()

    async def find_out(self) -> None:
        """Take the configured number, or measure one block, unless that was done before on this machine."""
        if self._section.throughput != "auto":
            self.rates = Rates(throughput=float(self._section.throughput))
            return
        raise ConfigError("swarm.throughput = auto cannot be measured yet", hint="set a number")
