"""MXFP4 weights have the values that transformers gives them."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from petalsd.ops.mxfp4 import unpack_mxfp4

LARGEST_SCALE = 252  # of which no value is too large


def test_every_byte_and_scale_has_its_value() -> None:
    """Exactly, the smallest ones too, which are subnormal."""
    scales = torch.arange(LARGEST_SCALE + 1, dtype=torch.uint8)[:, None].repeat(1, 16)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(len(scales), 1, 1)
    values = unpack_mxfp4(blocks, scales)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].t()
    assert values.dtype == torch.bfloat16 and values.shape == (len(scales), 512)
    assert torch.equal(values.float(), expected)
    assert values[120].unique().numel() == 15


@pytest.mark.parametrize("scale", [254, 255])
def test_scales_that_make_no_numbers_are_seen(scale: int) -> None:
    """Infinite, or not a number, for whoever looks at the result."""
    values = unpack_mxfp4(
        torch.full((1, 2, 16), 0x77, dtype=torch.uint8), torch.tensor([[100, scale]], dtype=torch.uint8)
    )
    assert torch.isfinite(values[0, :32]).all() and not torch.isfinite(values[0, 32:]).any()
