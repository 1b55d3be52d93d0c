"""What a step or a pass must look like. Everything a peer can get wrong that needs the session to be seen.

Pure: nothing is changed, so a refused step leaves its session as it was. Errors name the fields of the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from petalsd.engine.limits import EngineLimits
from petalsd.engine.step import PassRequest, SessionSpec, Step
from petalsd.errors import BadRequest, Draining, NotServed, shortened
from petalsd.types import BlockSpan


def check_span(span: BlockSpan, served: BlockSpan | None) -> None:
    """NotServed unless all of ``span`` is served."""
    if served is None:
        raise NotServed(f"blocks {span}: no blocks are served here now")
    if not served.covers(span):
        raise NotServed(f"blocks {span}: only {served} are served here")


@dataclass(frozen=True, slots=True)
class Restriction:
    """New work is taken on the ``kept`` blocks alone, on none when that is None, because of ``reason``."""

    kept: BlockSpan | None
    reason: str

    def check(self, span: BlockSpan) -> None:
        """Draining unless all of ``span`` is kept."""
        if self.kept is None or not self.kept.covers(span):
            raise Draining(f"blocks {span}: {self.reason}", hint="use another server")


def check_session(spec: SessionSpec, limits: EngineLimits) -> None:
    """BadRequest when a session of this shape can never be opened."""
    if not 0 < spec.batch <= limits.max_session_rows:
        raise BadRequest("batch size", spec.batch, f"must be 1 to {limits.max_session_rows}")
    if not 0 <= spec.max_tokens <= limits.max_session_tokens:
        raise BadRequest("max_length", spec.max_tokens, f"must be 0 to {limits.max_session_tokens}")


def check_adapter(adapter: str | None, there: Sequence[str]) -> None:
    """NotServed unless the adapter is one of these, or none is asked for: another server may have it."""
    if adapter is not None and adapter not in there:
        names = f"the adapters here are {', '.join(there)}" if there else "this server has no adapters"
        raise NotServed(f"active_adapter = {shortened(adapter)}: {names}")


def check_step(step: Step, spec: SessionSpec, position: int, hidden_size: int) -> None:
    """BadRequest unless the session, now at ``position``, can take the step."""
    batch, tokens = _check_hidden(step.hidden, hidden_size)
    if batch != spec.batch:
        raise BadRequest("hidden states", tuple(step.hidden.shape), f"the batch size is {spec.batch}")
    if not 0 <= step.start <= position:
        raise BadRequest(
            "start_from_position", step.start, f"must be 0 to {position}, the session's position"
        )
    if step.start + tokens > spec.max_tokens:
        rule = f"{tokens} new tokens from position {step.start} on go beyond it"
        raise BadRequest("max_length", spec.max_tokens, rule)
    if step.prompts is not None:
        _check_prompts(step.prompts, len(spec.span), step.hidden)
    if step.hypo_ids is not None:
        _check_hypo_ids(step.hypo_ids, spec.batch)


def check_pass(request: PassRequest, limits: EngineLimits, hidden_size: int) -> None:
    """BadRequest unless the pass can be computed."""
    batch, tokens = _check_hidden(request.hidden, hidden_size)
    shape = tuple(request.hidden.shape)
    if batch == 0:
        raise BadRequest("hidden states", shape, "the batch must not be empty")
    if tokens > limits.max_session_tokens:
        raise BadRequest("hidden states", shape, f"a row may have at most {limits.max_session_tokens} tokens")
    if request.prompts is not None:
        _check_prompts(request.prompts, len(request.span), request.hidden)
    grad = request.grad_output
    if grad is not None and (tuple(grad.shape) != shape or not grad.is_floating_point()):
        raise BadRequest("grad_outputs", _describe(grad), f"must be floats of shape {shape}")


def _check_hidden(hidden: torch.Tensor, hidden_size: int) -> tuple[int, int]:
    """Return the batch size and the number of tokens."""
    if hidden.dim() != 3 or hidden.shape[2] != hidden_size or not hidden.is_floating_point():
        rule = f"must be floats of shape [batch, tokens, {hidden_size}]"
        raise BadRequest("hidden states", _describe(hidden), rule)
    return hidden.shape[0], hidden.shape[1]


def _check_prompts(prompts: torch.Tensor, num_blocks: int, hidden: torch.Tensor) -> None:
    batch, tokens, hidden_size = hidden.shape
    rule = f"must be floats of shape [{num_blocks} blocks, {batch} or 1, prefix, {hidden_size}]"
    if prompts.dim() != 4 or not prompts.is_floating_point():
        raise BadRequest("prompts", _describe(prompts), rule)
    blocks, rows, prefix, width = prompts.shape
    if blocks != num_blocks or rows not in (1, batch) or width != hidden_size:
        raise BadRequest("prompts", _describe(prompts), rule)
    if prefix > tokens:
        raise BadRequest(
            "prompts", _describe(prompts), f"the prefix is longer than the {tokens} tokens given"
        )


def _check_hypo_ids(hypo_ids: tuple[int, ...], batch: int) -> None:
    if len(hypo_ids) != batch:
        raise BadRequest("hypo_ids", hypo_ids, f"must hold {batch} row numbers, one per row")
    if not all(0 <= row < batch for row in hypo_ids):
        raise BadRequest("hypo_ids", hypo_ids, f"row numbers must be 0 to {batch - 1}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
