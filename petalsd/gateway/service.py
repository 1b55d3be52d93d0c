"""The gateway as a whole: a model of the swarm, and what listens for requests to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import structlog

from petalsd.client.model import RemoteCausalLM
from petalsd.client.swarm_client import SwarmClient
from petalsd.control.connection import ConnectionLimits, Server
from petalsd.control.listening import listen
from petalsd.errors import MissingBlocks
from petalsd.gateway.api import Api
from petalsd.gateway.generation import Generators
from petalsd.gateway.keys import Keys
from petalsd.gateway.prompts import Prompts, default_sampling
from petalsd.types import HostPort

log = structlog.get_logger(__name__)

_MORE_CONNECTIONS = 64  # than answers: those that ask for something else, or come when there are too many
_CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """name             what the model is called
    max_generations  answers that are made at the same time
    """

    name: str
    address: HostPort
    max_generations: int = 16
    keys: Keys = field(default_factory=Keys)


class Gateway:
    """``start`` it once, then ``stop`` it; the model is its owner's."""

    def __init__(self, model: RemoteCausalLM, tokenizer: Any, options: GatewayOptions) -> None:
        prompts = Prompts(tokenizer, model.config, default_sampling(model.generation_config))
        self._options = options
        self._generators = Generators(model, tokenizer, options.max_generations)
        self._api = Api(
            options.name, prompts, self._generators, options.keys, lambda: missing_blocks(model.client)
        )
        self._listener: asyncio.Server | None = None
        self._server: Server | None = None

    async def start(self) -> list[HostPort]:
        """The addresses that it listens on. AddressUnavailable, or ConfigError, when that cannot be had."""
        most = self._options.max_generations + _MORE_CONNECTIONS
        limits = ConnectionLimits(lambda peer: False, most, most)
        self._server = Server(self._api.handle, limits, handler_cancellation=True)
        self._listener, addresses = await listen(self._server, self._options.address, "--listen")
        log.info("listening", addresses=[str(address) for address in addresses], model=self._options.name)
        return addresses

    async def stop(self, deadline_s: float) -> None:
        """Take no more requests, and cut off the answers that are not complete by then."""
        if self._listener is not None:
            self._listener.close()
        num_cut = await self._generators.drain(deadline_s)
        if self._server is not None:
            await self._server.shutdown(_CLOSE_TIMEOUT_S)
        self._generators.close()
        log.info("stopped", cut_off=num_cut)


def missing_blocks(client: SwarmClient) -> MissingBlocks | None:
    """Those that no server holds by the client's newest view of the directory. From any thread."""
    served = {block for span in client.manager.spans for block in span.span}
    missing = [block for block in client.manager.blocks if block not in served]
    return MissingBlocks(missing, client.prefix, client.options.adapter) if missing else None
