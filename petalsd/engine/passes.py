"""Forward and backward passes without a cache, as generators that do one unit of work per ``next``.

So the engine can let decode steps in between and give a pass up at any point. How much a unit is says the
``Pace`` that the engine sets. Gradient modes are entered within a unit, never across a ``yield``: they belong to
the thread, not to the generator.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from petalsd.engine.block_units import Pace, PassUnit, backward_block, forward_block
from petalsd.engine.iteration_cost import NO_WORK, Work
from petalsd.engine.step import PassRequest
from petalsd.models.contract import Block, with_adapter

PassUnits: TypeAlias = Generator[PassUnit, None, list[torch.Tensor]]


@dataclass(slots=True)
class PassJob:
    """A pass in the engine; ``units`` is its generator once it has begun. Times are of ``time.monotonic``.

    ``work`` is what its units did so far, ``device_s`` what that took.
    """

    key: int
    request: PassRequest
    answer: asyncio.Future[list[torch.Tensor]]
    arrived_at: float = field(default_factory=time.monotonic)
    begun_at: float = 0.0
    work: Work = NO_WORK
    device_s: float = 0.0
    units: PassUnits | None = field(default=None, repr=False)

    @property
    def is_backward(self) -> bool:
        return self.request.grad_output is not None


@dataclass(frozen=True, slots=True)
class PassRunner:
    """Computes passes over ``blocks`` (block number -> block).

    ``max_tokens`` bounds the memory: rows of so many tokens go through all blocks together, one row at least.
    """

    blocks: Mapping[int, Block]
    dtype: torch.dtype
    device: torch.device
    max_tokens: int

    def start(self, request: PassRequest, pace: Pace) -> PassUnits:
        """The generator of a request: backward when it brings the gradient of the output."""
        grad_output = request.grad_output
        if grad_output is None:
            return self.forward(request, pace)
        return self.backward(request, grad_output, pace)

    def forward(self, request: PassRequest, pace: Pace) -> PassUnits:
        """Returns one ``[B, n, M]`` on the CPU in the model's dtype."""
        output = torch.empty(request.hidden.shape, dtype=self.dtype)
        for rows in self._row_groups(request):
            states = self._load(request.hidden[rows])
            prompts = self._prompts_of(request, rows)
            for k, block in enumerate(request.span):
                entering, states = _add_prompt(states, prompts, k), torch.empty_like(states)
                yield from forward_block(self._block(block, request), entering, states, pace)
            output[rows] = states.cpu()
            if rows.stop < request.hidden.shape[0]:
                yield PassUnit(None, is_pause=True)
        return [output]

    def backward(self, request: PassRequest, grad_output: torch.Tensor, pace: Pace) -> PassUnits:
        """Recompute the pass and return the gradients of what entered it, on the CPU in the model's dtype.

        First ``[B, n, M]`` for the hidden states; when the request has prompts, then ``[len(span), B, prefix, M]``
        for those, ascending by block and for every row, also when the prompts were the same for all rows.
        """
        grad_hidden = torch.empty(request.hidden.shape, dtype=self.dtype)
        grad_prompts = self._empty_grad_prompts(request)
        for rows in self._row_groups(request):
            prompts = self._prompts_of(request, rows)
            inputs = [self._load(request.hidden[rows])]
            for k, block in enumerate(list(request.span)[:-1]):
                entering = _add_prompt(inputs[k], prompts, k)
                inputs.append(torch.empty_like(entering))
                yield from forward_block(self._block(block, request), entering, inputs[-1], pace)
            grad = self._load(grad_output[rows])
            for k, block in reversed(list(enumerate(request.span))):
                entering, leaving = _add_prompt(inputs.pop(), prompts, k), grad
                grad = torch.empty_like(leaving)
                yield from backward_block(self._block(block, request), entering, leaving, grad, pace)
                if grad_prompts is not None:
                    grad_prompts[k, rows] = grad[:, : grad_prompts.shape[2]].cpu()
            grad_hidden[rows] = grad.cpu()
            if rows.stop < request.hidden.shape[0]:
                yield PassUnit(None, is_pause=True)
        return [grad_hidden] if grad_prompts is None else [grad_hidden, grad_prompts]

    def group_rows(self, request: PassRequest) -> int:
        """Rows that go through the blocks together: as many as ``max_tokens`` allows, at least one."""
        return max(1, self.max_tokens // max(1, request.hidden.shape[1]))

    def _row_groups(self, request: PassRequest) -> Iterator[slice]:
        batch, tokens, _ = request.hidden.shape
        if tokens == 0:
            return
        step = self.group_rows(request)
        for first in range(0, batch, step):
            yield slice(first, first + step)

    def _block(self, index: int, request: PassRequest) -> Block:
        return with_adapter(self.blocks[index], request.adapter)

    def _load(self, states: torch.Tensor) -> torch.Tensor:
        return states.detach().to(self.device, self.dtype)

    def _prompts_of(self, request: PassRequest, rows: slice) -> torch.Tensor | None:
        """``[len(span), rows or 1, prefix, M]`` on the device."""
        prompts = request.prompts
        if prompts is None or prompts.shape[2] == 0:
            return None
        return self._load(prompts if prompts.shape[1] == 1 else prompts[:, rows])

    def _empty_grad_prompts(self, request: PassRequest) -> torch.Tensor | None:
        if request.prompts is None:
            return None
        blocks, _, prefix, width = request.prompts.shape
        return torch.empty(blocks, request.hidden.shape[0], prefix, width, dtype=self.dtype)


def _add_prompt(states: torch.Tensor, prompts: torch.Tensor | None, k: int) -> torch.Tensor:
    """A copy of ``states`` ``[b, n, M]`` with slice ``k`` added to the first tokens; itself without prompts."""
    if prompts is None:
        return states
    states = states.clone()
    states[:, : prompts.shape[2]] += prompts[k]
    return states
