"""Rotary angles against transformers' own rotary embedding, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from petalsd.errors import ModelError
from petalsd.models.block_config import BlockConfig
from petalsd.models.rope import Rope
from tests.tiny_models import ROPE_VARIANTS

CPU = torch.device("cpu")


def _config(variant: str, **changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
    }
    rope = {"rope_theta": 10000.0, **ROPE_VARIANTS[variant], **changes}
    return {"model_type": "llama", **sizes, "rope_parameters": rope}


def _reference(raw: dict[str, Any], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = LlamaRotaryEmbedding(LlamaConfig.from_dict(raw))(torch.empty(0), positions[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("variant", ROPE_VARIANTS)
@pytest.mark.parametrize("end", [5, 40, 300, 3000])
def test_angles_equal_transformers(variant: str, end: int) -> None:
    """For every scaling, on either side of the lengths where it changes, the bits are transformers'."""
    raw = _config(variant)
    positions = torch.arange(max(0, end - 7), end)
    ours = Rope(BlockConfig.from_hf(raw), torch.float32, CPU).cos_sin(positions)
    for mine, theirs in zip(ours, _reference(raw, positions), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("variant", ["yarn", "llama3", "longrope"])
@pytest.mark.parametrize("end", [20, 40, 300])
def test_the_original_length_may_stand_beside_the_scaling(variant: str, end: int) -> None:
    """As Phi-3 has it, and models that were made of it: it counts before one among the parameters."""
    raw = {**_config(variant), "original_max_position_embeddings": 24}
    positions = torch.arange(end - 7, end)
    ours = Rope(BlockConfig.from_hf(raw), torch.float32, CPU).cos_sin(positions)
    for mine, theirs in zip(ours, _reference(raw, positions), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("variant", ["dynamic", "longrope"])
def test_rows_of_different_length_get_their_own_angles(variant: str) -> None:
    """Where angles depend on the row's length, each token is rotated by its own row's."""
    raw = _config(variant)
    rope = Rope(BlockConfig.from_hf(raw), torch.float32, CPU)
    assert rope.is_length_dependent
    ends = [20, 280, 400]
    positions = torch.cat([torch.arange(end - 3, end) for end in ends])
    seq_lens = torch.tensor(ends).repeat_interleave(3)
    together = rope.cos_sin(positions, seq_lens)
    for row, end in enumerate(ends):
        for mine, theirs in zip(together, _reference(raw, torch.arange(end - 3, end)), strict=True):
            assert torch.equal(mine[row * 3 : row * 3 + 3], theirs)


def test_a_chunk_takes_the_length_of_its_whole_step() -> None:
    """The first chunk of a long step is rotated as the step that it belongs to."""
    raw = _config("dynamic")
    rope = Rope(BlockConfig.from_hf(raw), torch.float32, CPU)
    chunk = rope.cos_sin(torch.arange(100), torch.full((100,), 600))
    whole = _reference(raw, torch.arange(600))
    assert torch.equal(chunk[0], whole[0][:100])


def test_the_models_dtype_is_reached_by_rounding() -> None:
    """Angles are computed in float32 and rounded once, as transformers does."""
    rope = Rope(BlockConfig.from_hf(_config("default")), torch.bfloat16, CPU)
    positions = torch.arange(1000, 1010)
    assert torch.equal(rope.cos_sin(positions)[1], _reference(_config("default"), positions)[1].bfloat16())


def test_proportional_scaling_leaves_a_part_unrotated() -> None:
    """The frequencies past partial_rotary_factor are zero, so cosine is one."""
    raw = _config("default", rope_type="proportional", partial_rotary_factor=0.5)
    cos, _ = Rope(BlockConfig.from_hf(raw), torch.float32, CPU).cos_sin(torch.tensor([7]))
    assert torch.equal(cos[0, 4:8], torch.ones(4))
    assert not torch.equal(cos[0, :4], torch.ones(4))


def test_an_empty_batch_has_no_angles() -> None:
    """No tokens, no rows: shapes stay right."""
    cos, sin = Rope(BlockConfig.from_hf(_config("dynamic")), torch.float32, CPU).cos_sin(
        torch.empty(0, dtype=torch.long)
    )
    assert cos.shape == sin.shape == (0, 16)


def test_factors_of_the_wrong_length_are_refused() -> None:
    """longrope with too few factors is a ModelError, not a crash in the middle of a step."""
    raw = _config("longrope", short_factor=[1.0] * 3)
    with pytest.raises(ModelError, match="rope_parameters"):
        Rope(BlockConfig.from_hf(raw), torch.float32, CPU).cos_sin(torch.tensor([0]))
