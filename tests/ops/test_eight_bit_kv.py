"""Keys and values of 8 bits, token by token: what is written is read again, rounded."""

from __future__ import annotations

import pytest
import torch

from petalsd.ops.eight_bit_kv import Float8KV, Int8KV

SHAPE = (4, 16, 2, 32)
SLOTS = torch.tensor([17, 3, 60])


@pytest.mark.parametrize(("kind", "error"), [(Int8KV, 0.5 / 127), (Float8KV, 2**-4)], ids=["int8", "float8"])
def test_what_is_read_is_what_was_written_but_for_its_rounding(
    kind: type[Int8KV | Float8KV], error: float
) -> None:
    """Half a step of the scale for int8, whose scale follows each head; half a unit of float8's last place."""
    kv = kind.allocate(SHAPE, torch.float32, torch.device("cpu"))
    k, v = torch.randn(3, 2, 32) * torch.tensor([[1e-3], [50.0]]), torch.randn(3, 2, 32)
    kv.write(SLOTS, k, v)
    for states, read in zip((k, v), kv.gather(SLOTS), strict=True):
        assert read.dtype == torch.float32
        greatest = states.abs().amax(-1, keepdim=True) if kind is Int8KV else states.abs()
        assert ((read - states).abs() <= greatest * error + 2**-10).all()


def test_a_head_that_is_not_finite_is_nan_and_alone_so() -> None:
    """In int8 its scale is; the heads and tokens beside it are as without it."""
    kv = Int8KV.allocate(SHAPE, torch.float32, torch.device("cpu"))
    k = torch.ones(3, 2, 32)
    k[1, 0, 5] = torch.inf
    kv.write(SLOTS, k, k)
    read, _ = kv.gather(SLOTS)
    assert read[1, 0].isnan().all()
    assert torch.equal(read[:, 1], k[:, 1]) and torch.equal(read[::2], k[::2])


def test_float8_keeps_what_lies_beyond_its_range_at_its_end() -> None:
    """Instead of NaN, which is all that the format has there; NaN itself stays."""
    kv = Float8KV.allocate(SHAPE, torch.float32, torch.device("cpu"))
    k = torch.full((3, 2, 32), -1e4)
    k[2] = torch.nan
    kv.write(SLOTS, k, -k)
    read_k, read_v = kv.gather(SLOTS)
    assert (read_k[:2] == -448).all() and (read_v[:2] == 448).all() and read_k[2].isnan().all()
