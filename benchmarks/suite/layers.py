"""One decode step of what families without a fused block are made of, in this process, on one thread.

All blocks as transformers' layers over packed weights, beside transformers itself; and the experts of one sparse
block of Qwen3-30B-A3B's shape, beside the same experts one after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.benchmark import Benchmark, Options
from benchmarks.local_model import LayerModel, ReferenceModel, dtype_of
from benchmarks.report import OURS, TORCH, TRANSFORMERS, Row, describe_setting
from benchmarks.timing import Work, summarize, take_turns
from petalsd.models.cpu_products import CpuProducts
from petalsd.models.hf.experts import KernelExperts
from petalsd.ops.packed_weight import WeightFormat

STEPS = ((1, 256), (1, 2048), (1, 8192), (8, 256), (8, 2048))
"""Sessions, and tokens that each has behind it."""

EXPERTS, PER_TOKEN, HIDDEN, INNER = 32, 8, 2048, 768
TOKENS = (1, 8)
EXPERT_FORMATS = ("bfloat16", "int4", "int8")
_FORMAT = "bfloat16"


def run(options: Options) -> list[Row]:
    rows = measure_steps(options)
    for kind in EXPERT_FORMATS:
        if options.has_time(f"experts in {kind}"):
            rows += measure_experts(kind, options)
    return rows


def measure_steps(options: Options) -> list[Row]:
    model = LayerModel(options.model, _FORMAT)
    reference = ReferenceModel(options.model, _FORMAT) if options.compare else None
    rows = []
    for sessions, context in [(1, 16)] if options.smoke else STEPS:
        setting = {"format": _FORMAT, "sessions": sessions, "context": context, "threads": 1}
        if not options.has_time(describe_setting(setting)):
            continue
        works: dict[str, Work] = {OURS: model.step(sessions, context, 1, 1)}
        if reference is not None:
            works[TRANSFORMERS] = reference.step(sessions, context, 1, 1)
        nbytes = round(model.model_bytes) + model.kv_bytes(sessions, context)
        rows += rows_of(works, setting, "decode step of packed layers", nbytes, options)
        gc.collect()
    return rows


class Experts:
    """As transformers holds them; what is packed takes the place of the weights."""

    def __init__(self, num_experts: int) -> None:
        self.act_fn = nn.SiLU()
        self.gate_up_proj = 0.02 * torch.randn(num_experts, 2 * INNER, HIDDEN)
        self.down_proj = 0.02 * torch.randn(num_experts, HIDDEN, INNER)


def measure_experts(kind: str, options: Options) -> list[Row]:
    num_experts = PER_TOKEN if options.smoke else EXPERTS
    torch.set_num_threads(1)
    experts = CpuProducts(1).pack_experts(Experts(num_experts), WeightFormat(kind))
    assert isinstance(experts, KernelExperts)
    rows = []
    for tokens in TOKENS[:1] if options.smoke else TOKENS:
        inputs = draw(num_experts, tokens, dtype_of(kind))
        works: dict[str, Work] = {
            OURS: step_of(experts, inputs),
            TORCH: step_of(experts.whole, inputs),
        }
        chosen = len(torch.unique(inputs[1]))
        nbytes = experts.whole.nbytes * chosen // num_experts
        setting = {"format": kind, "tokens": tokens, "threads": 1}
        rows += rows_of(works, setting, "experts of a block", nbytes, options)
    return rows


def draw(num_experts: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """States, experts and shares."""
    chosen = torch.stack([torch.randperm(num_experts)[:PER_TOKEN] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN).to(dtype), chosen, torch.rand(tokens, PER_TOKEN).to(dtype)


def step_of(experts: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Work:
    @torch.inference_mode()
    def work() -> None:
        experts(*inputs)

    return work


def rows_of(
    works: dict[str, Work], setting: dict[str, int | str], metric: str, nbytes: int, options: Options
) -> Iterator[Row]:
    for name, seconds in take_turns(works, options.pace).items():
        yield Row(name, setting, metric, "ms", summarize([1e3 * each for each in seconds]), nbytes)


BENCHMARK = Benchmark(
    "layers",
    "one decode step through all blocks as packed layers, or through a block's experts, in this process",
    run,
    30.0,
)
