"""Blocks made of transformers' layers compute what the whole model does, paged and dense, packed and plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.config import Quantization
from petalsd.models.architecture import Architecture
from petalsd.models.contract import Block
from petalsd.models.hf.families import FAMILIES
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.types import BlockSpan
from tests.numeric import assert_close
from tests.paged_rows import PagedRows
from tests.reference_layers import through_layers
from tests.tiers import nightly_except
from tests.tiny_models import FAMILIES as FUSED
from tests.tiny_models import LAYER_VARIANTS, ROPE_VARIANTS, make_tiny

CPU = torch.device("cpu")
NUM_TOKENS = 50
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **LAYER_VARIANTS,
    **{family: (family, {}) for family in FUSED},
    "llama-dynamic": ("llama", {"rope": "dynamic", "max_position_embeddings": 32}),
    "phimoe-longrope": (
        "phimoe",
        {
            **LAYER_VARIANTS["phimoe"][1],
            "rope": None,
            "rope_parameters": {
                "rope_theta": 10000.0,
                **ROPE_VARIANTS["longrope"],
                "short_mscale": 1.2,
                "long_mscale": 1.5,
            },
        },
    ),
}
LENGTH_DEPENDENT = ("phi3-longrope", "llama-dynamic", "phimoe-longrope")
CASES = [(variant, rung) for variant in sorted(VARIANTS) for rung in (Rung.PACKED, Rung.PLAIN)]


class Case:
    """A tiny model, its blocks on one rung below the fused one, and random states ``[1, n, M]``."""

    def __init__(self, path: Path, variant: str, rung: Rung) -> None:
        family, overrides = VARIANTS[variant]
        self.variant, self.rung = variant, rung
        self.reference = make_tiny(family, path, **overrides)
        self.source = ModelSource(str(path))
        self.ladder = Ladder(
            Architecture.read(self.source.config()), self.source, WeightStorage.choose(torch.float32, CPU), 1
        )
        self.config = self.ladder.architecture.config
        self.blocks: list[Block] = [self.ladder.build(rung, index) for index in range(self.config.num_blocks)]
        self.inputs = torch.randn(
            1, NUM_TOKENS, self.config.hidden_size, generator=torch.Generator().manual_seed(1)
        )

    def expected(self, span: BlockSpan, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
        with torch.no_grad():
            return through_layers(self.reference, self.inputs[:, :num_tokens], span)


def daily_cases() -> list[tuple[str, Rung]]:
    """All with packed weights, as they are served, and of the others those that attend or route in other ways."""
    plain = ("bloom", "falcon", "gemma2", "gpt_oss", "llama", "llama-dynamic", "mixtral", "phi3-longrope")
    return [(variant, rung) for variant, rung in CASES if rung is Rung.PACKED or variant in plain]


@pytest.fixture(
    params=nightly_except(CASES, *daily_cases()), ids=lambda case: f"{case[0]}-{case[1]}", scope="module"
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("model"), *request.param)


def run_paged(
    case: Case, span: BlockSpan, rows: PagedRows, hidden: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """One iteration: these rows' new tokens ``[n, M]`` through the blocks of ``span``."""
    batch = rows.extend({row: len(states) for row, states in hidden.items()})
    counts = torch.tensor(batch.token_bounds).diff()
    seq_lens = torch.tensor(batch.context_lens).repeat_interleave(counts)
    states = torch.cat(list(hidden.values()))
    with torch.inference_mode():
        cos_sin = case.ladder.angles.cos_sin(batch.positions, seq_lens)
        for index in span:
            states = case.blocks[index].forward_paged(states, rows.kv, batch, cos_sin)
    return dict(zip(hidden, states.split(counts.tolist()), strict=True))


def paged_rows(case: Case) -> PagedRows:
    """In the order of the CPU's kernels for packed layers; plain ones attend by torch, over small pages."""
    config = case.config
    shape = config.num_blocks, config.num_kv_heads, config.head_dim
    return PagedRows(*shape, 16).in_head_major() if case.rung is Rung.PACKED else PagedRows(*shape, 8)


def test_every_family_of_the_table_is_tested() -> None:
    """No row without a model in these tests."""
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES)


def test_dense_equals_transformers(case: Case) -> None:
    """Each block, and all of them one after the other, for whole sequences without a cache."""
    states = case.inputs
    for index, block in enumerate(case.blocks):
        alone = block.forward_dense(case.inputs)
        assert_close(alone, case.expected(BlockSpan(index, index + 1)), 1e-4, 1e-4, f"block {index}")
        states = block.forward_dense(states)
    assert_close(states, case.expected(BlockSpan(0, len(case.blocks))), 1e-4, 1e-4, "all blocks")


@pytest.mark.parametrize("span", [BlockSpan(0, 4), BlockSpan(1, 3)], ids=str)
def test_rows_at_different_places_in_one_batch_equal_transformers(case: Case, span: BlockSpan) -> None:
    """Chunked prefills and decodes of several rows in one batch, and of a row alone, through any run of blocks."""
    if case.variant in LENGTH_DEPENDENT:
        pytest.skip("the angles of these depend on how a row was cut into steps")
    rows, expected = paged_rows(case), case.expected(span)[0]
    ids = [rows.add_row() for _ in range(3)]
    for counts in ([20, 0, 3], [7, 33, 1], [1, 1, 1], [1, 0, 1], [1, 1, 20], [1, 1, 1], [0, 5, 1]):
        starts = {row: rows.lengths[row] for row in ids}
        new = {
            row: case.inputs[0, starts[row] : starts[row] + n]
            for row, n in zip(ids, counts, strict=True)
            if n
        }
        for row, states in run_paged(case, span, rows, new).items():
            wanted = expected[starts[row] : rows.lengths[row]]
            assert_close(states, wanted, 1e-4, 1e-4, f"row {row} from {starts[row]}")


def test_rows_of_different_lengths_in_one_prefill_equal_transformers(case: Case) -> None:
    """Also where the angles depend on a row's length: each row as if it were alone."""
    rows, span = paged_rows(case), BlockSpan(0, 4)
    lengths = {rows.add_row(): length for length in (NUM_TOKENS, 9, 33)}
    new = {row: case.inputs[0, :length] for row, length in lengths.items()}
    for row, states in run_paged(case, span, rows, new).items():
        expected = case.expected(span, lengths[row])[0]
        assert_close(states, expected, 1e-4, 1e-4, f"{lengths[row]} tokens")


def test_gradients_equal_transformers(case: Case) -> None:
    """The gradient at the input of a pass through all blocks."""
    ours, theirs = (case.inputs.clone().requires_grad_() for _ in range(2))
    weights = torch.randn(case.inputs.shape, generator=torch.Generator().manual_seed(3))
    hidden = ours
    for block in case.blocks:
        hidden = block.forward_dense(hidden)
    (gradient,) = torch.autograd.grad((hidden * weights).sum(), ours)
    states = through_layers(case.reference, theirs, BlockSpan(0, len(case.blocks)))
    (expected,) = torch.autograd.grad((states * weights).sum(), theirs)
    scale = float(expected.abs().max())
    assert_close(gradient, expected, 1e-4 * max(1.0, scale), 1e-4, "gradient of the input")


@pytest.mark.parametrize(
    "case", [(variant, Rung.PACKED) for variant in sorted(VARIANTS)], ids="-".join, indirect=True
)
@pytest.mark.parametrize("quantization", nightly_except(["int8", "int4"], "int4"))
def test_quantized_layers_round_activations_little(case: Case, quantization: Quantization) -> None:
    """Beside what a block adds; with a gradient, which there is too, nothing is rounded but the weights.

    Of sparse blocks a tenth of the tokens is left out: a rounding can send one to another expert.
    """
    is_sparse = case.ladder.architecture.layers.family.experts is not None
    counted = NUM_TOKENS - (NUM_TOKENS // 10 if is_sparse else 0)
    storage = WeightStorage.choose(torch.float32, CPU, quantization)
    ladder = Ladder(case.ladder.architecture, case.source, storage, num_threads=1)
    for index in range(case.config.num_blocks):
        block, inputs = ladder.build(Rung.PACKED, index), case.inputs.clone().requires_grad_()
        exact = block.forward_dense(inputs)
        (gradient,) = torch.autograd.grad(exact.sum(), inputs)
        assert torch.isfinite(gradient).all()
        rounded = block.forward_dense(inputs.detach())
        errors = (rounded - exact).norm(dim=-1).flatten().sort().values[:counted]
        assert 0.001 < errors.norm() / (exact - inputs).norm() < 0.05, f"block {index}"
