"""The remote blocks as one differentiable function, so that whatever stands before them can be trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from petalsd.client.history import check_prompts
from petalsd.client.passes import ForwardTrace, SwarmPasses
from petalsd.client.runtime import ClientRuntime

_MAX_EXPONENT = 126
"""Of a power of two that float32 can be divided by and multiplied with."""


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
        (grad,) = grads
        scale = _scale_of(grad)
        if scale is None:  # a loss scaler looks for this, and no server takes it
            return None, None, _nan_like(grad), None if prompts is None else _nan_like(prompts)
        # Gradients are linear, and servers that compute in float16 have a narrow range.
        trace = ForwardTrace(grad, ctx.pieces)
        grad_inputs, grad_prompts = ctx.runtime.run(ctx.passes.backward(trace, grad / scale, prompts))
        return None, None, grad_inputs * scale, None if grad_prompts is None else grad_prompts * scale


def _scale_of(grad: torch.Tensor) -> float | None:
    """The power of two next above all of ``grad``, by which nothing is rounded; None where one is not finite."""
    largest = float(grad.abs().max()) if grad.numel() else 0.0
    if not math.isfinite(largest):
        return None
    _, exponent = math.frexp(largest)
    return 2.0 ** max(-_MAX_EXPONENT, min(exponent, _MAX_EXPONENT))


def _nan_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan)


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
