"""The remote blocks as one differentiable function, so that whatever stands before them can be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from petalsd.client.history import check_prompts
from petalsd.client.passes import ForwardTrace, SwarmPasses
from petalsd.client.runtime import ClientRuntime


class _RemotePass(torch.autograd.Function):
    """Forward and backward run on the swarm; the blocks' own weights are never changed there."""

    @staticmethod
    def forward(
        ctx: Any,
        runtime: ClientRuntime,
        passes: SwarmPasses,
        hidden: torch.Tensor,
        prompts: torch.Tensor | None,
    ) -> torch.Tensor:
        trace: ForwardTrace = runtime.run(passes.forward(hidden, prompts))
        ctx.runtime, ctx.passes, ctx.pieces = runtime, passes, trace.pieces
        ctx.save_for_backward(hidden, prompts)  # what is changed in between is noticed
        return trace.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, torch.Tensor, torch.Tensor | None]:
        _, prompts = ctx.saved_tensors
        trace = ForwardTrace(grads[0], ctx.pieces)
        grad_inputs, grad_prompts = ctx.runtime.run(ctx.passes.backward(trace, grads[0], prompts))
        return None, None, grad_inputs, grad_prompts


def remote_blocks(
    runtime: ClientRuntime, passes: SwarmPasses, hidden: torch.Tensor, prompts: torch.Tensor | None = None
) -> torch.Tensor:
    """All remote blocks over ``hidden`` ``[B, n, M]``, causal from position 0; differentiable.

    ``prompts`` ``[num_blocks, B or 1, prefix, M]`` are added to the first positions of each block's input, and get
    gradients too. BadRequest for others.
    """
    if prompts is not None:
        check_prompts(prompts, hidden, len(passes.blocks))
        prompts = prompts if prompts.numel() else None  # on the wire that says the same
    output: torch.Tensor = _RemotePass.apply(runtime, passes, hidden, prompts)  # type: ignore[no-untyped-call]
    return output
