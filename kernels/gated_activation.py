"""The gate of an MLP: an activation of one half of each row times the other half."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    """Of powers below one alone, so that nothing overflows."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x < 0, power, 1.0) / (1.0 + power)


@triton.jit
def gated_activation_kernel(
    gate_up,
    out,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr = None,
    ALPHA: tl.constexpr = None,
):
    """Grid (rows, pieces of BLOCK columns). In float32; the activation is rounded where transformers rounds it.

    LIMIT, ALPHA: of "clamped_swish", which bounds the other half, too, and adds 1 to it.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    dtype: tl.constexpr = gate_up.dtype.element_ty
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "clamped_swish":
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1.0
        active = gate * _sigmoid(ALPHA * gate)
    elif ACTIVATION == "silu":
        active = gate * _sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        active = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        tl.static_assert(ACTIVATION == "relu")
        active = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    active = active.to(dtype).to(tl.float32)
    tl.store(out + row * out_stride + columns, (active * up).to(out.dtype.element_ty), mask=inside)
