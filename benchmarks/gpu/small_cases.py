"""The kernels between the products, and the products themselves, at the shapes of a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from benchmarks.gpu.cards import Shape
from benchmarks.gpu.case import Case, Site, relative_error
from benchmarks.gpu.pages import Rows
from benchmarks.gpu.roofline import BATCHES
from benchmarks.report import TORCH
from petalsd.ops.add_norm import add_norm, reference_add_norm
from petalsd.ops.dense_linear import dense_linear
from petalsd.ops.gated_activation import gated_activation, reference_gated_activation
from petalsd.ops.norm import Norm
from petalsd.ops.packed_weight import PackedWeight, WeightFormat
from petalsd.ops.page_copies import copy_pages
from petalsd.ops.quantized_linear import quantized_linear, reference_quantized_linear
from petalsd.ops.rope_kv import Rotation, reference_rope_and_write, rope_and_write
from petalsd.ops.split_workspace import SplitWorkspace
from petalsd.ops.weight_packing import pack_weight

PREFILL_TOKENS = 1024
NUM_COPIES = 256
_EPS = 1e-5


def cases(site: Site, shape: Shape) -> Iterator[Case]:
    for rows in (*BATCHES, PREFILL_TOKENS // site.scale):
        yield norm(site, shape, rows)
        yield activation(site, shape, rows)
        yield rope(site, shape, rows)
    for name, size in shape.projections.items():
        yield from products(site, name, site.randn(*size))
    yield copies(site, shape)


def norm(site: Site, shape: Shape, rows: int) -> Case:
    x, residual, weight = (
        site.randn(rows, shape.hidden),
        site.randn(rows, shape.hidden),
        site.randn(shape.hidden),
    )
    start, out, wanted = residual.clone(), torch.empty_like(x), Norm(weight, _EPS)

    def run() -> None:
        add_norm(x, residual, wanted, out)

    def by_torch() -> torch.Tensor:
        residual.add_(x)
        return functional.rms_norm(residual, (shape.hidden,), weight, _EPS)

    def errors() -> list[float]:
        residual.copy_(start)
        run()
        total, normed = reference_add_norm(x, start, wanted)
        return [relative_error(residual, total), relative_error(out, normed)]

    nbytes = 4 * x.nbytes + weight.nbytes
    return Case("add_norm", {"rows": rows}, run, errors, nbytes, rivals={TORCH: by_torch})


def activation(site: Site, shape: Shape, rows: int) -> Case:
    gate_up, out = site.randn(rows, 2 * shape.inner), site.randn(rows, shape.inner)

    def by_torch() -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    return Case(
        "gated_activation",
        {"rows": rows},
        lambda: gated_activation(gate_up, out, "silu"),
        lambda: [relative_error(out, reference_gated_activation(gate_up, "silu"))],
        gate_up.nbytes + out.nbytes,
        rivals={TORCH: by_torch},
    )


def rope(site: Site, shape: Shape, rows: int) -> Case:
    """The last token of each row at a context of 64 tokens, which is long enough to turn all angles."""
    paged = Rows.draw(site, shape, [64] * rows)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    qkv, q = site.randn(rows, width), site.randn(rows, shape.num_heads, shape.head_dim)
    turns = torch.arange(64.0, device=site.device)[:, None] / 10000 ** torch.linspace(
        0, 1, shape.head_dim // 2, device=site.device
    )
    rotation, batch = Rotation(torch.stack((turns.cos(), turns.sin()), 1).contiguous()), paged.decode()

    def errors() -> list[float]:
        slots = (batch.write_origins * paged.kv.page_tokens + batch.write_offsets).long()
        written = paged.kv.gather(slots)
        expected = reference_rope_and_write(qkv, paged.kv, batch, 0, rotation)
        pairs = zip(written, paged.kv.gather(slots), strict=True)
        return [relative_error(q, expected), *(relative_error(ours, theirs) for ours, theirs in pairs)]

    return Case(
        "rope_and_write",
        {"rows": rows},
        lambda: rope_and_write(qkv, q, paged.kv, batch, 0, rotation),
        errors,
        2 * qkv.nbytes,
    )


def products(site: Site, name: str, weight: torch.Tensor) -> Iterator[Case]:
    """By ``weight`` ``[out, in]`` as it is, and in 8 and 4 bits."""
    workspace = SplitWorkspace.allocate(site.device, site.num_sms)
    packed = [
        pack_weight(weight.cpu(), format).to(site.device) for format in (WeightFormat.INT8, WeightFormat.INT4)
    ]
    for rows in (*BATCHES, PREFILL_TOKENS // site.scale):
        x = site.randn(rows, weight.shape[1])
        yield dense_product(name, x, weight, workspace)
        for each in packed:
            yield quantized_product(name, x, each, workspace, weight)


def dense_product(name: str, x: torch.Tensor, weight: torch.Tensor, workspace: SplitWorkspace) -> Case:
    """Beside torch's, which it is for many rows."""
    out, theirs = (x.new_empty(len(x), len(weight)) for _ in range(2))
    return Case(
        f"{name} dense",
        {"rows": len(x)},
        lambda: dense_linear(x, weight, None, out, workspace),
        lambda: [relative_error(out, x.float() @ weight.float().t())],
        weight.nbytes + x.nbytes + out.nbytes,
        flops=2 * len(x) * weight.numel(),
        rivals={TORCH: lambda: torch.mm(x, weight.t(), out=theirs)},
    )


def quantized_product(
    name: str, x: torch.Tensor, packed: PackedWeight, workspace: SplitWorkspace, weight: torch.Tensor
) -> Case:
    """Beside the dense product of the weight that was packed."""
    out, dense = x.new_empty(len(x), packed.num_out), x.new_empty(len(x), packed.num_out)
    return Case(
        f"{name} {packed.format.value}",
        {"rows": len(x)},
        lambda: quantized_linear(x, packed, None, out, workspace),
        lambda: [relative_error(out, reference_quantized_linear(x, packed, None))],
        packed.nbytes + x.nbytes + out.nbytes,
        flops=2 * len(x) * weight.numel(),
        rivals={f"{TORCH} dense": lambda: torch.mm(x, weight.t(), out=dense)},
    )


def copies(site: Site, shape: Shape) -> Case:
    """Pages that sessions shared, each to a place of its own."""
    count = NUM_COPIES // site.scale
    paged = Rows.draw(site, shape, [32 * 2 * count])
    pages = paged.origins[0, : 2 * count].contiguous()
    src, dst = pages[:count].contiguous(), pages[count:].contiguous()

    def by_torch() -> None:
        for slab in paged.kv.slabs:
            slab.index_copy_(0, dst.long(), slab.index_select(0, src))

    def errors() -> list[float]:
        return [relative_error(slab[dst.long()], slab[src.long()]) for slab in paged.kv.slabs]

    nbytes = 2 * sum(slab[0].nbytes for slab in paged.kv.slabs) * count
    return Case(
        "copy_pages",
        {"pages": count},
        lambda: copy_pages(paged.kv, src, dst),
        errors,
        nbytes,
        rivals={TORCH: by_torch},
    )
