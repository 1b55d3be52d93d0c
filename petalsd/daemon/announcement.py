"""What we say about ourselves in the swarm: one record, as things are at the moment of writing."""

from __future__ import annotations

from collections.abc import Callable

from petalsd import __version__
from petalsd.daemon.plan import ServingPlan
from petalsd.daemon.speed import Speed
from petalsd.engine.engine import Engine
from petalsd.swarm.protocol import ServerState
from petalsd.swarm.record import ServerRecord
from petalsd.types import BlockSpan

VERSION = f"petalsd {__version__}"


class RecordWriter:
    """Fills the server record of protocol.md 2.3; the announcer adds the pings.

    ``max_blocks``: how many blocks may be served, None where it is not for the rule of placement to say.
    """

    def __init__(
        self,
        plan: ServingPlan,
        engine: Engine,
        speed: Speed,
        public_name: str | None,
        max_blocks: Callable[[], int | None],
    ) -> None:
        self._plan = plan
        self._engine = engine
        self._speed = speed
        self._public_name = public_name
        self._max_blocks = max_blocks

    def describe(self, state: ServerState, span: BlockSpan, is_relayed: bool) -> ServerRecord:
        """``cache_tokens_left`` counts K rows and V rows separately, over all our blocks: the wire's unit.

        A part of what is served, or what joins it, is as fast as the whole and no faster: others plan with it.
        """
        rates, served, pool = self._speed.rates, self._engine.span, self._engine.pool
        num_blocks = max(len(span), 0 if served is None else len(served))
        return ServerRecord(
            state=state,
            throughput=rates.announced(num_blocks, is_relayed=is_relayed),
            span=span,
            public_name=self._public_name,
            version=VERSION,
            network_rps=rates.network_rps,
            forward_rps=rates.forward_rps,
            inference_rps=rates.inference_rps,
            torch_dtype=self._plan.dtype_name,
            quant_type=self._plan.storage.quantization,
            adapters=self._plan.adapter_names,
            using_relay=is_relayed,
            max_blocks=self._max_blocks(),
            cache_tokens_left=None if pool is None else 2 * pool.tokens_free,
        )
