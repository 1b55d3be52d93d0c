"""Gated experts on a CPU: all that a step chooses in one call, instead of two products for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petalsd import _C
from petalsd.ops.packed_product import PackedProduct


class NativeExperts:
    """SiLU-gated experts by the CPU's kernels on ``team``, over the weights of such products, which live as long.

    gate_up  ``[2 * I, M]`` of each expert, gate above up
    down     ``[M, I]`` of each

    KVPoolError where their sizes do not fit.
    """

    def __init__(
        self, gate_up: Sequence[PackedProduct], down: Sequence[PackedProduct], team: _C.LayerTeam
    ) -> None:
        self._products = gate_up, down
        self._experts = _C.GatedExperts(*([one.native for one in part] for part in self._products))
        self._team = team

    def multiply(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden ``[T, M]``; the experts of each token and their weights ``[T, k]``; returns ``[T, M]``.

        Float32 between the products; a float32 hidden is not rounded beside bfloat16 weights. A token's result
        depends on no other's. KVPoolError for an expert that is none.
        """
        out = torch.empty(hidden.shape, dtype=torch.float32)
        if not len(hidden):
            return out.to(hidden.dtype)
        states, shares = (part.float().contiguous() for part in (hidden, top_k_weights))
        chosen = top_k_index.long().contiguous()
        self._team.run_experts(
            self._experts,
            list(chosen.shape),
            [part.data_ptr() for part in (chosen, shares, states, out)],
            hidden.dtype == torch.float32,
        )
        return out.to(hidden.dtype)
