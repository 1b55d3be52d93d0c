"""What goes into the engine and what comes out. All tensors are on the CPU; the engine moves and casts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from petalsd.types import BlockSpan

CANARY_PEER = "self-test"  # whose sessions and passes are the engine's own


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a client asks for when it opens a session; fixed for the session's life.

    span         the blocks it runs through, a sub-range of what is served
    batch        rows (sequences), >= 1
    max_tokens   positions each row may reach
    peer         base58 PeerID that fairness is counted by
    adapter      the blocks' adapter that it is computed with; None: the model as it is
    """

    span: BlockSpan
    batch: int
    max_tokens: int
    peer: str
    alloc_timeout_s: float = 0.0
    adapter: str | None = None


class Step(NamedTuple):
    """One step of a session.

    hidden     ``[B, n, M]`` any float dtype; n may be 0 (nothing is computed, the same shape is answered)
    start      position of the first new token, ``0 <= start <= session.position``; smaller rolls back
    prompts    None, or ``[len(span), B or 1, prefix, M]`` with prefix <= n: slice k is added to the first
               ``prefix`` tokens of the input of block k
    hypo_ids   None, or B ints in ``[0, B)``: row j continues from old row hypo_ids[j], applied before the step
    """

    hidden: torch.Tensor
    start: int
    prompts: torch.Tensor | None = None
    hypo_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class PassRequest:
    """A forward or backward pass through blocks without a cache, causal from position 0.

    hidden       ``[B, n, M]`` the states that enter the first block
    prompts      as in Step
    grad_output  backward only: ``[B, n, M]``, the gradient at the last block's output
    adapter      as in SessionSpec
    """

    span: BlockSpan
    hidden: torch.Tensor
    peer: str
    prompts: torch.Tensor | None = None
    grad_output: torch.Tensor | None = None
    adapter: str | None = None
