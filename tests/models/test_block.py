"""A block computes what transformers' decoder layer computes: dense, paged, chunked, batched, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from petalsd.models.block import TransformerBlock
from petalsd.models.block_config import BlockConfig
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.weights import load_block
from tests.numeric import assert_close
from tests.paged_rows import PagedRows
from tests.tiny_models import FAMILIES, HIDDEN_SIZE, ROPE_VARIANTS, make_tiny

CPU = torch.device("cpu")
NUM_TOKENS = 50

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"llama-{rope}": ("llama", {"rope": rope}) for rope in ROPE_VARIANTS},
    "llama-dynamic-grown": ("llama", {"rope": "dynamic", "max_position_embeddings": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral-wide-heads": ("mistral", {"head_dim": 32, "sliding_window": 64}),
    "qwen3-biases-window": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
}

CHUNKABLE = [name for name in sorted(VARIANTS) if name not in ("llama-longrope", "llama-dynamic-grown")]
"""Without those whose angles depend on how a row was cut into steps."""


class Case:
    """A tiny model, our blocks of it, and what transformers' layers do to random hidden states."""

    def __init__(self, path: Path, family: str, overrides: dict[str, Any]) -> None:
        self.reference = make_tiny(family, path, **overrides)
        source = ModelSource(str(path))
        self.config = BlockConfig.from_hf(source.config())
        self.rope = Rope(self.config, torch.float32, CPU)
        self.blocks = [
            load_block(source, self.config, index, torch.float32, CPU, rope=self.rope)
            for index in range(self.config.num_blocks)
        ]
        self.inputs = torch.randn(1, NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            states = self.reference.model(inputs_embeds=self.inputs, output_hidden_states=True)
        self.states: tuple[torch.Tensor, ...] = states.hidden_states[:-1]

    def expected(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters and what leaves this block, ``[1, n, M]``; the last block's output is normed away by HF."""
        return self.states[block], self.states[block + 1]


@pytest.fixture(params=sorted(VARIANTS), scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, overrides = VARIANTS[request.param]
    return Case(tmp_path_factory.mktemp("model"), family, overrides)


def _run_paged(
    case: Case, blocks: list[TransformerBlock], rows: PagedRows, hidden: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """One iteration: these rows' new tokens ``[n, M]`` through these blocks; each row ends its step here."""
    batch = rows.extend({row: len(states) for row, states in hidden.items()})
    counts = torch.tensor(batch.token_bounds).diff()
    seq_lens = torch.tensor(batch.context_lens).repeat_interleave(counts)
    states = torch.cat(list(hidden.values()))
    with torch.inference_mode():
        cos_sin = case.rope.cos_sin(batch.positions, seq_lens)
        for block in blocks:
            states = block.forward_paged(states, rows.kv, batch, cos_sin)
    return dict(zip(hidden, states.split(counts.tolist()), strict=True))


def test_dense_equals_transformers(case: Case) -> None:
    """A dense pass through any block gives the hidden states of transformers' layer to 1e-4."""
    for block in case.blocks[:-1]:
        entering, leaving = case.expected(block.index)
        assert_close(block.forward_dense(entering), leaving, 1e-4, 1e-4, f"block {block.index}")


def test_one_paged_prefill_equals_transformers(case: Case) -> None:
    """A prefill in one piece through all blocks gives transformers' hidden states to 1e-4."""
    rows = PagedRows(4, case.config.num_kv_heads, case.config.head_dim, page_tokens=8)
    row = rows.add_row()
    out = _run_paged(case, case.blocks[:-1], rows, {row: case.inputs[0]})
    assert_close(out[row], case.states[-1][0], 1e-4, 1e-4, "hidden states after the prefill")


@pytest.mark.parametrize("case", CHUNKABLE, indirect=True)
def test_rows_at_different_places_in_one_batch_equal_transformers(case: Case) -> None:
    """Chunked prefills and decodes of several rows in one batch, and of a row alone, give the same states."""
    rows = PagedRows(4, case.config.num_kv_heads, case.config.head_dim, page_tokens=8)
    steps = [[20, 0, 3], [7, 33, 1], [1, 1, 1], [1, 0, 1], [1, 1, 20], [1, 1, 1], [0, 5, 1]]
    ids = [rows.add_row() for _ in range(3)]
    for counts in steps:
        starts = {row: rows.lengths[row] for row in ids}
        new = {
            row: case.inputs[0, starts[row] : starts[row] + n]
            for row, n in zip(ids, counts, strict=True)
            if n
        }
        for row, states in _run_paged(case, case.blocks[:-1], rows, new).items():
            expected = case.states[-1][0, starts[row] : rows.lengths[row]]
            assert_close(states, expected, 1e-4, 1e-4, f"row {row} from {starts[row]}")


def test_steps_equal_transformers_with_a_cache(case: Case) -> None:
    """Steps of a session give what transformers gives with a cache and the same steps, for all scalings."""
    rows = PagedRows(4, case.config.num_kv_heads, case.config.head_dim, page_tokens=8)
    row = rows.add_row()
    cache = DynamicCache(config=case.reference.config)
    start = 0
    for count in [20, 5, *[1] * 10, 9, 1, 1, 4]:
        new = case.inputs[:, start : start + count]
        with torch.no_grad():
            states = case.reference.model(
                inputs_embeds=new, past_key_values=cache, use_cache=True, output_hidden_states=True
            )
        out = _run_paged(case, case.blocks[:-1], rows, {row: new[0]})
        assert_close(out[row], states.hidden_states[-2][0], 1e-4, 1e-4, f"{count} tokens from {start}")
        start += count


def test_gradients_equal_transformers(case: Case) -> None:
    """The gradient at the input of a dense pass equals transformers' to 1e-4."""
    ours, theirs = (case.inputs.clone().requires_grad_() for _ in range(2))
    weights = torch.randn(case.inputs.shape, generator=torch.Generator().manual_seed(3))
    hidden = ours
    for block in case.blocks[:-1]:
        hidden = block.forward_dense(hidden)
    (gradient,) = torch.autograd.grad((hidden * weights).sum(), ours)
    states = case.reference.model(inputs_embeds=theirs, output_hidden_states=True).hidden_states[-2]
    (expected,) = torch.autograd.grad((states * weights).sum(), theirs)
    assert_close(gradient, expected, 1e-4, 1e-4, "gradient of the input")


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    """In bfloat16 paged and dense agree with float32 within the error of bfloat16."""
    make_tiny("qwen3", tmp_path)
    source = ModelSource(str(tmp_path))
    config = BlockConfig.from_hf(source.config())
    wide = load_block(source, config, 0, torch.float32, CPU)
    narrow = load_block(source, config, 0, torch.bfloat16, CPU)
    hidden = torch.randn(1, 24, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))
    rows = PagedRows(1, config.num_kv_heads, config.head_dim, page_tokens=8, dtype=torch.bfloat16)
    batch = rows.extend({rows.add_row(): 24})
    paged = narrow.forward_paged(hidden[0].bfloat16(), rows.kv, batch, narrow.rope.cos_sin(batch.positions))
    assert narrow.dtype == paged.dtype == torch.bfloat16
    assert narrow.nbytes * 2 == wide.nbytes
    expected = wide.forward_dense(hidden)[0]
    tolerance = 0.02 * float(expected.abs().max())
    assert_close(paged, expected, tolerance, 0.0, "paged bfloat16")
    assert_close(narrow.forward_dense(hidden.bfloat16())[0], expected, tolerance, 0.0, "dense bfloat16")


@pytest.mark.parametrize("case", ["llama", "llama-dynamic-grown", "llama-longrope"], indirect=True)
def test_a_backward_pass_works_after_paged_steps(case: Case) -> None:
    """What the shared Rope made under inference mode can be differentiated through."""
    rope = Rope(case.config, torch.float32, CPU)
    with torch.inference_mode():
        rope.cos_sin(torch.arange(NUM_TOKENS))
    block = TransformerBlock(0, case.config, case.blocks[0].weights, rope)
    hidden = case.inputs.clone().requires_grad_()
    block.forward_dense(hidden).sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
