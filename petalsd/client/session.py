"""An inference session: one sequence (or batch of them) through all blocks, over servers that may come and go."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Protocol

import structlog
import torch

from petalsd.client.chain import ChainLink
from petalsd.client.connection import Connector
from petalsd.client.history import PromptHistory, StepLog, check_prompts
from petalsd.client.relay import RelayPlan
from petalsd.client.retry import REMOTE_ERRORS, RetryBudget
from petalsd.client.routing import Hop
from petalsd.client.span_session import StreamTerms
from petalsd.errors import BadRequest, MissingBlocks, SessionClosed
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)


class Router(Protocol):
    """What a session asks of the sequence manager."""

    def route_session(self, blocks: BlockSpan, max_tokens: int) -> list[Hop]:
        """The servers for these blocks, in order; MissingBlocks when some have none."""

    async def refresh(self) -> None:
        """Read the directory anew."""

    def is_far(self, peer: str) -> bool:
        """Whether the way to it takes long enough for others to hand it our steps."""

    def report_failure(self, peer: str) -> None: ...

    def report_success(self, peer: str) -> None: ...


class InferenceSession:
    """Steps of hidden states through ``blocks``; survives the loss of servers exactly.

    Every link of the chain keeps the inputs that entered its span, so a lost span is replaced by any servers that
    hold its blocks: they are fed the same inputs from position 0, and the step goes on where it stopped. Assigning
    ``position`` rolls back. One step at a time; a step that fails leaves the position where it was.
    """

    def __init__(self, router: Router, connector: Connector, terms: StreamTerms, blocks: BlockSpan) -> None:
        self.blocks = blocks
        self.max_tokens = terms.max_tokens
        self._router = router
        self._connector = connector
        self._terms = terms
        self._links: list[ChainLink] = []
        self._prompts = PromptHistory(blocks.start)
        self._steps = StepLog(terms.whole_from)
        self._relays = RelayPlan(router.is_far)
        self._position = 0
        self._batch: int | None = None
        self._is_closed = False
        self._turn = asyncio.Lock()

    @property
    def position(self) -> int:
        """Tokens that each row has behind it. Assigning a smaller value rolls back to it."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if not 0 <= value <= self._position:
            raise BadRequest("position", value, f"a session rolls back to 0..{self._position}")
        self._position = value

    @property
    def route(self) -> list[Hop]:
        """The servers in use, in order; empty before the first step."""
        return [link.hop for link in self._links]

    async def step(
        self,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None = None,
        hypo_ids: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Run ``[B, n, M]`` through the blocks from ``position`` on; returns the same shape in the same dtype.

        prompts   ``[len(blocks), B or 1, prefix, M]`` with prefix <= n, added to each block's input
        hypo_ids  B old row numbers: row j goes on from old row ``hypo_ids[j]``

        Raises BadRequest for what breaks these rules, the server's error where it is permanent, and the last
        server's or MissingBlocks when no way on was found within the limits of the options.
        """
        async with self._turn:
            self._check(hidden, prompts, hypo_ids)
            if hypo_ids == tuple(range(hidden.shape[0])):
                hypo_ids = None
            try:
                output = await self._advance(hidden.detach(), prompts, hypo_ids)
            except BaseException as error:
                was_closed = self._is_closed
                for link in self._links:
                    link.forget()
                if (
                    was_closed or hypo_ids is not None
                ):  # some rows have changed places already, others have not
                    await self.close()
                    self._links = []
                if was_closed and isinstance(error, Exception):
                    raise SessionClosed("the session was closed meanwhile") from None
                raise
            self._position += hidden.shape[1]
            return output.to(hidden.dtype)

    async def close(self) -> None:
        """End the streams; idempotent. A step that is under way fails, and ends what it has opened since."""
        self._is_closed = True
        await asyncio.gather(*(link.close() for link in self._links))
        if not self._turn.locked():
            self._links = []

    async def __aenter__(self) -> InferenceSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _advance(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, hypo_ids: tuple[int, ...] | None
    ) -> torch.Tensor:
        budget = RetryBudget(self._terms.options)
        if not self._links:
            self._links = await self._find_links(self.blocks, budget)
        self._batch = hidden.shape[0]
        self._note_inputs(prompts, hypo_ids)
        self._plan_relays(hidden, is_plain=prompts is None and hypo_ids is None)
        flow, index = hidden, 0
        while index < len(self._links):
            self._links[index].history.append(flow)
            flow = await self._pass_through(index, budget, hypo_ids)
            index += 1
        self._check_open()
        return flow

    def _note_inputs(self, prompts: torch.Tensor | None, hypo_ids: tuple[int, ...] | None) -> None:
        """Bring all histories to the session's position, in the order of rows that this step wants."""
        self._prompts.truncate(self._position)
        self._steps.truncate(self._position)
        self._steps.add(self._position)
        for link in self._links:
            link.rewind(self._position)
        if hypo_ids is not None:
            self._prompts.reorder(hypo_ids)
            for link in self._links:
                link.reorder(hypo_ids)
        if prompts is not None:
            self._prompts.add(self._position, prompts.detach())

    def _plan_relays(self, hidden: torch.Tensor, *, is_plain: bool) -> None:
        """A step goes from server to server when it is one message everywhere, of states and nothing else."""
        if is_plain and hidden.shape[0] * hidden.shape[1] <= self._terms.options.max_step_tokens:
            self._relays.begin(self._position)
        else:
            self._relays.skip()

    async def _pass_through(
        self, index: int, budget: RetryBudget, hypo_ids: tuple[int, ...] | None
    ) -> torch.Tensor:
        """Feed the link at ``index``, or whatever replaces it; returns what the next link has not seen yet."""
        while True:
            self._check_open()
            link = self._links[index]
            is_last = index + 1 == len(self._links)
            keep_from = self._position if is_last else self._links[index + 1].history.length
            relay = self._relays.relay(link, self._links[index + 1 :])
            try:
                output = await link.feed(self._prompts, self._steps, keep_from, hypo_ids, relay)
            except REMOTE_ERRORS as error:
                self._check_open()
                if await link.follow():
                    continue
                for peer in link.suspects:
                    self._router.report_failure(peer)
                log.info("span_failed", peer=link.hop.peer, blocks=str(link.hop.blocks), error=str(error))
                await asyncio.sleep(budget.next_delay(error))
                await self._replace(index, budget)
            else:
                self._router.report_success(link.hop.peer)
                return output

    async def _replace(self, index: int, budget: RetryBudget) -> None:
        """Put new links in the place of a failed one. The first of them inherits what it had been fed."""
        lost = self._links[index]
        first, *rest = await self._find_links(lost.hop.blocks, budget)
        first.history = lost.history
        self._links[index : index + 1] = [first, *rest]

    async def _find_links(self, blocks: BlockSpan, budget: RetryBudget) -> list[ChainLink]:
        while True:
            try:
                hops = self._router.route_session(blocks, self.max_tokens)
            except MissingBlocks as error:
                await asyncio.sleep(budget.next_delay(error))
                await self._router.refresh()
            else:
                return [ChainLink(hop, self._connector, self._terms) for hop in hops]

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosed("the session is closed")

    def _check(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, hypo_ids: tuple[int, ...] | None
    ) -> None:
        self._check_open()
        shape = tuple(hidden.shape)
        if hidden.ndim != 3 or shape[0] < 1 or (self._batch is not None and shape[0] != self._batch):
            rows = self._batch or "B"
            raise BadRequest("hidden", shape, f"the shape of a step is [{rows}, n, M]")
        if self._position + shape[1] > self.max_tokens:
            rule = f"position {self._position} + {shape[1]} exceeds the session's {self.max_tokens} tokens"
            raise BadRequest("hidden", shape, rule)
        if prompts is not None:
            check_prompts(prompts, hidden, len(self.blocks))
        if hypo_ids is not None and not (
            len(hypo_ids) == shape[0] and all(0 <= row < shape[0] for row in hypo_ids)
        ):
            raise BadRequest("hypo_ids", hypo_ids, f"{shape[0]} row numbers below {shape[0]} are needed")
