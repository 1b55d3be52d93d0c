"""What an adapter adds to a linear module: a product of two thin matrices beside the weight, which stays as it is.

LoRA (Hu et al., 2021): ``y = W x + scale * B (A x)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional

BaseProduct: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""``x @ weight.T + bias`` of the weight that is adapted, a tensor that nobody else holds."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRankFactors:
    """``a`` ``[r, in]`` and ``b`` ``[part, r]``, the scale in ``b``; ``start`` is the part's first output."""

    a: torch.Tensor
    b: torch.Tensor
    start: int = 0


class LowRankUpdate:
    """The low-rank terms of one product, for parts of its outputs that do not overlap."""

    def __init__(self, parts: Sequence[LowRankFactors]) -> None:
        # The inner products of all parts are one.
        self._a = torch.cat([part.a for part in parts])
        self._bs = [part.b for part in parts]
        self._ranks = [len(part.a) for part in parts]
        self._outputs = [slice(part.start, part.start + len(part.b)) for part in parts]

    @property
    def nbytes(self) -> int:
        return self._a.nbytes + sum(b.nbytes for b in self._bs)

    def add_to(self, product: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``product`` ``[..., out]`` of x ``[..., in]`` with the terms added, in place; both of one dtype.

        Differentiable with respect to both.
        """
        inner = torch.split(functional.linear(x, self._a), self._ranks, dim=-1)
        for outputs, b, factors in zip(self._outputs, self._bs, inner, strict=True):
            product[..., outputs].add_(functional.linear(factors, b))
        return product


class LowRankWeight:
    """Stands for a weight ``[out, in]`` in ``ops.linear``: the one below with low-rank terms beside it, if any."""

    def __init__(self, base: BaseProduct, update: LowRankUpdate | None) -> None:
        self._base = base
        self._update = update

    @property
    def nbytes(self) -> int:
        """What the terms take; the weight below is not theirs."""
        return 0 if self._update is None else self._update.nbytes

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``ops.linear`` has the contract."""
        product = self._base(x, bias)
        return product if self._update is None else self._update.add_to(product, x)
