"""What tests/interpreter.py changes."""

from __future__ import annotations

import pytest
import torch
import triton
from triton import language as tl
from triton.runtime import interpreter

from tests.device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels are compiled here")


@triton.jit
def combined_kernel(left, right, out, operation: tl.constexpr):
    if operation == "add":
        result = tl.load(left) + tl.load(right)
    elif operation == "sub":
        result = tl.load(left) - tl.load(right)
    else:
        result = tl.load(left) * tl.load(right)
    tl.store(out, result)


@triton.jit
def shaped_kernel(values, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    block = tl.load(values + row[:, None] * COLUMNS + column[None, :])
    tl.static_assert(block.shape[0] == ROWS and block.shape[1] == COLUMNS)
    turned = tl.trans(block)
    tl.static_assert(turned.shape[0] == COLUMNS and turned.numel == ROWS * COLUMNS)
    tl.store(out + column[:, None] * ROWS + row[None, :], turned)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_an_integer_that_overflows_is_told(operation: str, dtype: torch.dtype) -> None:
    """And one that just fits is not."""
    limits = torch.iinfo(dtype)
    fits = {"add": (limits.max - 1, 1), "sub": (limits.min + 1, 1), "mul": (limits.max // 2, 2)}[operation]
    beyond = {"add": (limits.max, 1), "sub": (limits.min, 1), "mul": (limits.max // 2 + 1, 2)}[operation]
    out = torch.zeros(1, dtype=dtype)
    left, right = (torch.tensor([value], dtype=dtype) for value in fits)
    combined_kernel[(1,)](left, right, out, operation)
    assert out == {"add": left + right, "sub": left - right, "mul": left * right}[operation]
    left, right = (torch.tensor([value], dtype=dtype) for value in beyond)
    with pytest.raises(interpreter.InterpreterError, match=f"overflow detected for operation {operation}"):
        combined_kernel[(1,)](left, right, out, operation)


def test_shapes_are_those_of_each_block() -> None:
    """Of types that are alike in shape or in elements, in any order."""
    for rows, columns in ((4, 8), (8, 4), (4, 8), (32, 1)):
        for dtype in (torch.float32, torch.int32, torch.float32):
            values = torch.arange(rows * columns, dtype=dtype).view(rows, columns)
            out = torch.empty(columns, rows, dtype=dtype)
            shaped_kernel[(1,)](values, out, rows, columns)
            assert torch.equal(out, values.T)
