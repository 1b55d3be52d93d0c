"""Gated experts on a CPU: all that a step chooses in one call, instead of two products for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petalsd import _C
from petalsd.ops.expert_gate import ClampedGate, ExpertBiases
from petalsd.ops.packed_product import PackedProduct


class NativeExperts:
    """Gated experts by the CPU's kernels on ``team``, over the weights of such products, which live as long.

    gate_up  ``[2 * I, M]`` of each expert, gate above up
    down     ``[M, I]`` of each
    gate     None: SiLU's
    biases   of all experts; float32 ones are not copied

    KVPoolError where the weights' sizes do not fit, ValueError where those of biases do not.
    """

    def __init__(
        self,
        gate_up: Sequence[PackedProduct],
        down: Sequence[PackedProduct],
        team: _C.LayerTeam,
        gate: ClampedGate | None = None,
        biases: ExpertBiases | None = None,
    ) -> None:
        self._products = gate_up, down
        self._biases = None if biases is None else biases.float()
        addresses = (0, 0)
        if self._biases is not None:
            _check(self._biases.gate_up, gate_up)
            _check(self._biases.down, down)
            addresses = self._biases.gate_up.data_ptr(), self._biases.down.data_ptr()
        self._experts = _C.GatedExperts(
            [one.native for one in gate_up],
            [one.native for one in down],
            addresses,
            None if gate is None else (gate.limit, gate.alpha),
        )
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


def _check(bias: torch.Tensor, products: Sequence[PackedProduct]) -> None:
    wanted = [len(products), products[0].num_out]
    if list(bias.shape) != wanted:
        raise ValueError(f"biases have shape {list(bias.shape)}: it must be {wanted}")
