"""Other programs' paged decode attention on the same pages, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from benchmarks.gpu.pages import PAGE_TOKENS, Rows
from benchmarks.timing import Work

Make = Callable[[torch.Tensor, Rows, float], Work]
_WORKSPACE_BYTES = 256 << 20
_VLLM_MODULES = (
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.attention.ops.triton_unified_attention",
)


def flashinfer(q: torch.Tensor, rows: Rows, scale: float) -> Work:
    """Its planned decode; planning is the host's work of each step and does not count. ImportError."""
    package = importlib.import_module("flashinfer")
    num_heads, head_dim = q.shape[1:]
    counts = -(-rows.lengths // PAGE_TOKENS)
    starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    pages = torch.cat([row[:count] for row, count in zip(rows.origins, counts.tolist(), strict=True)])
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        starts, pages, (rows.lengths - 1) % PAGE_TOKENS + 1, num_heads, rows.kv.k.shape[2], head_dim, PAGE_TOKENS,
        q_data_type=q.dtype, kv_data_type=rows.kv.k.dtype, sm_scale=scale,
    )  # fmt: skip
    return lambda: wrapper.run(q, (rows.kv.k, rows.kv.v))


def vllm(q: torch.Tensor, rows: Rows, scale: float) -> Work:
    """Its Triton kernel for all kinds of batches. ImportError."""
    attend = _vllm_attention()
    out, lengths = torch.empty_like(q), rows.lengths
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return lambda: attend(
        q=q, k=rows.kv.k, v=rows.kv.v, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths,
        max_seqlen_k=max(rows.contexts), softmax_scale=scale, causal=True, window_size=(-1, -1),
        block_table=rows.origins, softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
    )  # fmt: skip


def _vllm_attention() -> Callable[..., object]:
    for module in _VLLM_MODULES:
        try:
            return importlib.import_module(module).unified_attention
        except ModuleNotFoundError:
            continue
    raise ImportError("vllm is not installed, or keeps its kernel elsewhere")


def installed(q: torch.Tensor, rows: Rows, scale: float) -> tuple[dict[str, Work], tuple[str, ...]]:
    """The work of each that runs here, and why the others do not: they change their interfaces."""
    works: dict[str, Work] = {}
    skipped = []
    makes: dict[str, Make] = {"flashinfer": flashinfer, "vllm": vllm}
    for name, make in makes.items():
        try:
            work = make(q, rows, scale)
            work()
        except Exception as error:
            skipped.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            works[name] = work
    return works, tuple(skipped)
