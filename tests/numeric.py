"""How tests compare tensors: every failure names the worst coordinate."""

from __future__ import annotations

import torch


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float, what: str) -> None:
    """``|actual - expected| <= atol + rtol * |expected|`` everywhere, shapes equal, nothing NaN or infinite."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    left, right = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.isfinite(left).all(), f"{what}: {int((~torch.isfinite(left)).sum())} values are not finite"
    excess = (left - right).abs() - (atol + rtol * right.abs())
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        coordinate = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), left.shape))
        raise AssertionError(
            f"{what}: at {coordinate} got {left[coordinate]:.8g}, expected {right[coordinate]:.8g}; "
            f"{int((excess > 0).sum())} of {left.numel()} values are outside atol={atol:g} rtol={rtol:g}"
        )
