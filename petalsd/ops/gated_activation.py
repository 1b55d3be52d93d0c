"""The gate of an MLP over the fused gate and up projection, in one launch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.nn import functional

from petalsd.kernels.gated_activation import gated_activation_kernel
from petalsd.ops.expert_gate import ClampedGate
from petalsd.ops.launching import Constant, Options, check_tensor, launch, strides

# As configurations of models call them, and as the kernel does.
ACTIVATIONS: Mapping[str, str] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }
)
_CLAMPED = "clamped_swish"
_BLOCK = 1024


def gated_activation(gate_up: torch.Tensor, out: torch.Tensor, activation: str) -> None:
    """``out = activation(gate) * up``, computed in float32.

    gate_up     ``[T, 2*I]``, in each row the gate before the other half
    out         ``[T, I]``
    activation  a key of ``ACTIVATIONS``

    ValueError for tensors that don't fit, and other activations.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: one of {', '.join(ACTIVATIONS)}")
    _launch(gate_up, out, {"ACTIVATION": ACTIVATIONS[activation]})


def clamped_activation(gate_up: torch.Tensor, out: torch.Tensor, gate: ClampedGate) -> None:
    """``gated_activation`` with an activation that has bounds for both halves."""
    _launch(gate_up, out, {"ACTIVATION": _CLAMPED, "LIMIT": float(gate.limit), "ALPHA": float(gate.alpha)})


def _launch(gate_up: torch.Tensor, out: torch.Tensor, constants: Mapping[str, Constant]) -> None:
    rows, width = out.shape
    check_tensor("gate_up", gate_up, (rows, 2 * width))
    check_tensor("out", out, (rows, width))
    launch(
        gated_activation_kernel,
        (rows, -(-width // _BLOCK)),
        (gate_up, out, strides(gate_up)[0], strides(out)[0]),
        {"WIDTH": width, "BLOCK": _BLOCK, **constants},
        Options(num_warps=4, num_stages=1),
    )


def reference_gated_activation(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """``gated_activation`` in plain torch: ``[T, I]`` in gate_up's dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    match ACTIVATIONS[activation]:
        case "silu":
            active = functional.silu(gate)
        case "relu":
            active = functional.relu(gate)
        case kind:
            active = functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (active.to(gate_up.dtype).float() * up).to(gate_up.dtype)
