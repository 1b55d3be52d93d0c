"""Products with the weights of experts, at the shapes of a model with many small ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.case import Case, Site, relative_error
from benchmarks.gpu.roofline import BATCHES
from petalsd.ops.expert_linear import (
    block_rows,
    expert_linear,
    quantized_expert_linear,
    reference_expert_linear,
)
from petalsd.ops.expert_order import order_experts
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.split_workspace import SplitWorkspace
from petalsd.ops.weight_packing import pack_stack


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """``top_k`` of ``num_experts`` for each token; ``inner`` is the size of one's gate, and of its other half."""

    num_experts: int
    top_k: int
    hidden: int
    inner: int


OLMOE = ExpertShape(64, 8, 2048, 1024)


def cases(site: Site, shape: ExpertShape = OLMOE) -> Iterator[Case]:
    """Gate and up of all experts of a step, with weights as they are, and in 8 and 4 bits."""
    weight = site.randn(shape.num_experts, 2 * shape.inner, shape.hidden)
    for rows in BATCHES:
        yield product(site, shape, weight, rows)
    for format in (WeightFormat.INT8, WeightFormat.INT4):
        packed = pack_stack(weight, format, site.device)
        for rows in BATCHES:
            yield product(site, shape, packed, rows)


def product(site: Site, shape: ExpertShape, weight: torch.Tensor | PackedWeight, rows: int) -> Case:
    """Idle experts' weights are not read."""
    index = torch.rand(rows, shape.num_experts, device=site.device).topk(shape.top_k).indices
    order = order_experts(index, shape.num_experts, block_rows(rows, site.dtype))
    x, out = site.randn(rows, shape.hidden), site.randn(index.numel(), 2 * shape.inner)
    workspace = SplitWorkspace.allocate(site.device, site.num_sms)

    def run() -> None:
        if isinstance(weight, PackedWeight):
            quantized_expert_linear(x, weight, None, order, out, workspace)
        else:
            expert_linear(x, weight, None, order, out, workspace)

    def errors() -> list[float]:
        values = weight.unpack(site.dtype) if isinstance(weight, PackedWeight) else weight
        stacked = values.reshape(shape.num_experts, 2 * shape.inner, shape.hidden)
        return [relative_error(out, reference_expert_linear(x, stacked, None, index))]

    share = len(index.unique()) / shape.num_experts
    name = weight.format.value if isinstance(weight, PackedWeight) else "dense"
    return Case(
        f"experts {name}",
        {"rows": rows},
        run,
        errors,
        int(share * weight.nbytes) + x.nbytes + out.nbytes,
        flops=2 * out.numel() * shape.hidden,
    )
