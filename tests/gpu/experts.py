"""Run by ``test_experts`` in a process without Triton's interpreter: sparse layers by kernels on a real GPU.

    python -m tests.gpu.experts DTYPE

Prints one JSON object: for each family and format how far steps are from transformers' experts, as a share of what
these give, and whether replays of captured steps give the same; whether steps on two streams keep apart. A step
that waits for the device is an error.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from petalsd.ops.packed_weight import WeightFormat
from tests.kernels.sparse_layers import SPARSE_FAMILIES, sparse_pair

DEVICE = torch.device("cuda:0")
HIDDEN = 1024  # so that products are split
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 384, "moe_intermediate_size": 128, "head_dim": 64}
STEPS = (1, 5, 16, 48, 64)


def main() -> None:
    dtype = getattr(torch, sys.argv[1])
    found = {}
    for family in SPARSE_FAMILIES:
        for format in (None, WeightFormat.INT8, WeightFormat.INT4):
            theirs, ours = sparse_pair(family, format, dtype, DEVICE, **SIZES)
            with torch.inference_mode():
                steps = [_step(theirs, ours, num_tokens, dtype) for num_tokens in STEPS]
            name = f"{family}, {format or sys.argv[1]}"
            found[name] = {
                "error": max(error for error, _ in steps),
                "is_replayed": all(is_same for _, is_same in steps),
            }
    json.dump({"families": found, "is_apart": _streams_are_apart(dtype)}, sys.stdout)


def _streams_are_apart(dtype: torch.dtype) -> bool:
    """Whether steps of one layer on two streams at the same time give what they give alone."""
    _, ours = sparse_pair("olmoe", WeightFormat.INT8, dtype, DEVICE, **SIZES)
    states = [torch.randn(1, 1, HIDDEN, device=DEVICE).to(dtype) for _ in range(2)]
    streams = [torch.cuda.Stream(DEVICE) for _ in states]
    with torch.inference_mode():
        expected = [ours(each) for each in states]
        torch.cuda.synchronize()
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(500):
            for stream, each, alone in zip(streams, states, expected, strict=True):
                with torch.cuda.stream(stream):
                    found.append((ours(each), alone))
        torch.cuda.synchronize()
        return all(torch.equal(each, alone) for each, alone in found)


def _step(theirs: nn.Module, ours: nn.Module, num_tokens: int, dtype: torch.dtype) -> tuple[float, bool]:
    """Its error, and whether its replay over other states, NaN among them, is what is launched over those."""
    hidden = torch.randn(1, num_tokens, HIDDEN, device=DEVICE).to(dtype)
    expected = theirs(hidden).float()
    error = float((ours(hidden).float() - expected).norm() / expected.norm())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(hidden)
    hidden.normal_()
    hidden[:, 1::3] = float("nan")
    graph.replay()
    return error, torch.equal(captured.nan_to_num(), ours(hidden).nan_to_num())


if __name__ == "__main__":
    main()
