"""A block computes what transformers' decoder layer computes: dense, paged, chunked, batched, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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


class Case:
    """A tiny model, our blocks of it, and what transformers' layers do to random hidden states."""

    def __init__(self, path: Path, family: str, overrides: dict[str, Any]) -> None:
        reference = make_tiny(family, path, **overrides)
        source = ModelSource(str(path))
        self.config = BlockConfig.from_hf(source.config())
        self.rope = Rope(self.config, torch.float32, CPU)
        self.blocks = [
            load_block(source, self.config, index, torch.float32, CPU, rope=self.rope)
            for index in range(self.config.num_blocks)
        ]
        self.inputs = torch.randn(1, NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            states = reference.model(inputs_embeds=self.inputs, output_hidden_states=True)
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
) -> Any:
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
