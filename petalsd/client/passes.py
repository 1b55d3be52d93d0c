"""Forward and backward passes without cache through the swarm, with other servers where some fail.

The seam for training: ``autograd.RemoteBlocks`` makes of these a differentiable function of inputs and prompts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import structlog
import torch

from petalsd.client.connection import Connection, Connector, Metadata
from petalsd.client.options import ClientOptions
from petalsd.client.retry import REMOTE_ERRORS, RetryBudget
from petalsd.client.routing import Hop
from petalsd.client.silence import while_heard
from petalsd.errors import MissingBlocks, RemoteFailure
from petalsd.swarm.codec import DUMMY, packed_structure
from petalsd.swarm.protocol import make_chain
from petalsd.types import BlockSpan

log = structlog.get_logger(__name__)

_T = TypeVar("_T")
PassMethod = Callable[[str, Sequence[torch.Tensor], Metadata, float], Awaitable[list[torch.Tensor]]]


class PassRouter(Protocol):
    """What passes ask of the sequence manager."""

    def route_pass(self, blocks: BlockSpan) -> list[Hop]:
        """The servers for these blocks, in order; MissingBlocks when some have none."""

    async def refresh(self) -> None:
        """Read the directory anew."""

    def report_failure(self, peer: str) -> None: ...

    def report_success(self, peer: str) -> None: ...


@dataclass(frozen=True, slots=True)
class PassedSpan:
    """A span that a forward pass went through, and the states ``[B, n, M]`` that entered it."""

    hop: Hop
    inputs: torch.Tensor


@dataclass(frozen=True, slots=True)
class ForwardTrace:
    """What backward needs of a forward pass: rows were split into pieces, each went its own way."""

    output: torch.Tensor
    pieces: tuple[tuple[PassedSpan, ...], ...]


class SwarmPasses:
    """Passes through ``blocks``. ``prompts`` are ``[len(blocks), B or 1, prefix, M]`` everywhere."""

    def __init__(
        self,
        router: PassRouter,
        connector: Connector,
        prefix: str,
        blocks: BlockSpan,
        options: ClientOptions,
    ) -> None:
        self.blocks = blocks
        self._router = router
        self._connector = connector
        self._prefix = prefix
        self._options = options
        self._slots = asyncio.Semaphore(options.max_parallel_passes)

    async def forward(self, hidden: torch.Tensor, prompts: torch.Tensor | None = None) -> ForwardTrace:
        """Run ``[B, n, M]`` causally from position 0; the output has its shape and dtype."""
        rows = self._rows_per_piece(hidden)
        jobs = [
            self._forward_piece(hidden[first : first + rows], _prompt_rows(prompts, hidden, first, rows))
            for first in range(0, hidden.shape[0], rows)
        ]
        results = await _all_or_nothing(jobs)
        output = torch.cat([output for output, _ in results]).to(hidden.dtype)
        return ForwardTrace(output, tuple(spans for _, spans in results))

    async def backward(
        self, trace: ForwardTrace, grad_output: torch.Tensor, prompts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients for the inputs ``[B, n, M]`` and for the prompts (their shape), None without prompts."""
        jobs, first = [], 0
        for spans in trace.pieces:
            rows = spans[0].inputs.shape[0]
            piece_prompts = _prompt_rows(prompts, grad_output, first, rows)
            jobs.append(self._backward_piece(spans, grad_output[first : first + rows], piece_prompts))
            first += rows
        results = await _all_or_nothing(jobs)
        grad_inputs = torch.cat([grads for grads, _ in results]).to(grad_output.dtype)
        if prompts is None:
            return grad_inputs, None
        grad_prompts = torch.cat([grads for _, grads in results if grads is not None], dim=1)
        if prompts.shape[1] == 1:
            grad_prompts = grad_prompts.sum(dim=1, keepdim=True)
        return grad_inputs, grad_prompts.to(prompts.dtype)

    def _rows_per_piece(self, hidden: torch.Tensor) -> int:
        return max(self._options.max_step_tokens // max(hidden.shape[1], 1), 1)

    async def _forward_piece(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[PassedSpan, ...]]:
        async with self._slots:
            output, spans = await self._forward_range(
                hidden, prompts, self.blocks, RetryBudget(self._options)
            )
            return output, tuple(spans)

    async def _forward_range(
        self, hidden: torch.Tensor, prompts: torch.Tensor | None, blocks: BlockSpan, budget: RetryBudget
    ) -> tuple[torch.Tensor, list[PassedSpan]]:
        """Run through ``blocks``; after a failure another way is chosen from the first block not passed yet."""
        passed: list[PassedSpan] = []
        route: list[Hop] = []
        start = blocks.start
        while start < blocks.end:
            route = route or await self._find_route(BlockSpan(start, blocks.end), budget)
            hop = route.pop(0)
            try:
                output = await self._forward_call(hop, hidden, prompts)
            except REMOTE_ERRORS as error:
                await self._note_failure(hop, error, budget)
                route = []
                continue
            self._router.report_success(hop.peer)
            passed.append(PassedSpan(hop, hidden))
            hidden, start = output, hop.blocks.end
        return hidden, passed

    async def _backward_piece(
        self, spans: tuple[PassedSpan, ...], grad: torch.Tensor, prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Walk the spans in reverse; one that fails is passed forward again by other servers, then backward."""
        budget = RetryBudget(self._options)
        grad_prompts: list[torch.Tensor] = []
        async with self._slots:
            left = list(spans)
            while left:
                span = left.pop()
                try:
                    grads = await self._backward_call(span, grad, prompts)
                except REMOTE_ERRORS as error:
                    await self._note_failure(span.hop, error, budget)
                    _, again = await self._forward_range(span.inputs, prompts, span.hop.blocks, budget)
                    left.extend(again)
                    continue
                self._router.report_success(span.hop.peer)
                grad, *more = grads
                grad_prompts[:0] = more
        return grad, torch.cat(grad_prompts) if grad_prompts else None

    async def _forward_call(
        self, hop: Hop, hidden: torch.Tensor, prompts: torch.Tensor | None
    ) -> torch.Tensor:
        connection = self._connector(hop.peer)
        tensors = [hidden, self._prompts_of(prompts, hop.blocks)]
        outputs = await self._call(connection, connection.forward, hop, tensors)
        if len(outputs) != 1 or outputs[0].shape != hidden.shape:
            raise _nonsense(hop, outputs)
        return outputs[0]

    async def _backward_call(
        self, span: PassedSpan, grad: torch.Tensor, prompts: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """``[grad_inputs]`` or ``[grad_inputs, grad_prompts]``, checked."""
        connection = self._connector(span.hop.peer)
        slices = self._prompts_of(prompts, span.hop.blocks)
        expected = [tuple(span.inputs.shape)]
        if prompts is not None:
            expected.append((slices.shape[0], grad.shape[0], slices.shape[2], slices.shape[3]))
        outputs = await self._call(connection, connection.backward, span.hop, [span.inputs, grad, slices])
        if [tuple(output.shape) for output in outputs] != expected:
            raise _nonsense(span.hop, outputs)
        return outputs

    async def _call(
        self, connection: Connection, method: PassMethod, hop: Hop, tensors: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        metadata = {
            "points": 0.0,
            "active_adapter": self._options.adapter or "",
            "args_structure": packed_structure(len(tensors)),
        }
        uid = make_chain(self._prefix, hop.blocks)
        inputs = [tensor.detach() for tensor in tensors]
        answering = method(uid, inputs, metadata, self._options.request_timeout_s)
        return await while_heard(answering, connection, self._options)

    def _prompts_of(self, prompts: torch.Tensor | None, blocks: BlockSpan) -> torch.Tensor:
        if prompts is None:
            return DUMMY
        return prompts[blocks.start - self.blocks.start : blocks.end - self.blocks.start].contiguous()

    async def _find_route(self, blocks: BlockSpan, budget: RetryBudget) -> list[Hop]:
        while True:
            try:
                return self._router.route_pass(blocks)
            except MissingBlocks as error:
                await asyncio.sleep(budget.next_delay(error))
                await self._router.refresh()

    async def _note_failure(self, hop: Hop, error: Exception, budget: RetryBudget) -> None:
        self._router.report_failure(hop.peer)
        log.info("pass_failed", peer=hop.peer, blocks=str(hop.blocks), error=str(error))
        await asyncio.sleep(budget.next_delay(error))


def _prompt_rows(
    prompts: torch.Tensor | None, hidden: torch.Tensor, first: int, rows: int
) -> torch.Tensor | None:
    """The prompts of rows ``first`` to ``first + rows - 1``; what all rows share stays whole."""
    if prompts is None or prompts.shape[1] == 1 < hidden.shape[0]:
        return prompts
    return prompts[:, first : first + rows]


def _nonsense(hop: Hop, outputs: Sequence[torch.Tensor]) -> RemoteFailure:
    return RemoteFailure(
        hop.peer, f"answered tensors of shapes {[tuple(output.shape) for output in outputs]}"
    )


async def _all_or_nothing(jobs: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Results in order; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
