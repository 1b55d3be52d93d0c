"""The local parts of a model, packed: what plain tensors give, in less memory where nothing is lost by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from petalsd.client.head import LocalHead, PackedOutput
from petalsd.models.architecture import Architecture
from petalsd.models.head_rule import HeadRule
from petalsd.models.head_weights import HeadWeights, PackedHeadWeights, load_head, load_packed_head
from petalsd.models.source import ModelSource
from petalsd.ops.packed_weight import WeightFormat
from tests.numeric import assert_close
from tests.tiny_models import make_tiny

IDS = torch.tensor([[3, 0, 17], [4, 255, 16]])
RULE = HeadRule(embedding_scale=1.5, norm_offset=0.25)


def make_checkpoint(path: Path, dtype: torch.dtype, tied: bool) -> ModelSource:
    """Its values are those of the dtype, with vocabulary and width no multiples of a tile."""
    make_tiny("llama", path, tie_word_embeddings=tied, vocab_size=258).to(dtype).save_pretrained(path)
    return ModelSource(str(path))


def load(source: ModelSource, dtype: torch.dtype) -> tuple[HeadWeights, PackedHeadWeights | HeadWeights]:
    architecture = Architecture.read(source.config())
    what = source, architecture.config, architecture.head_rule(), dtype
    return load_head(*what), load_packed_head(*what)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_head_is_the_plain_one(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype, tied: bool
) -> None:
    """Embeddings bit for bit, logits to 1e-5 in float32 and to its rounding in bfloat16, gradients too."""
    plain, packed = (
        LocalHead(weights, RULE) for weights in load(make_checkpoint(tmp_path, stored, tied), dtype)
    )
    assert isinstance(packed.lm_head, PackedOutput)
    assert packed.norm is not None and plain.norm is not None
    assert torch.equal(packed.norm, plain.norm)
    embeds = packed.embed_tokens(IDS)
    assert torch.equal(embeds, plain.embed_tokens(IDS))
    bound = 1e-5 if dtype == torch.float32 else 0.01
    with torch.inference_mode():
        assert_close(packed.lm_head(embeds), plain.lm_head(embeds), bound, bound, "logits")
    grads = []
    for head in (packed, plain):
        entering = embeds.clone().requires_grad_()
        head.lm_head(entering).float().square().sum().backward()
        grads.append(entering.grad)
    assert_close(grads[0], grads[1], bound, bound, "gradient")


@pytest.mark.parametrize("tied", [True, False])
def test_values_that_bfloat16_holds_stay_in_it(tmp_path: Path, tied: bool) -> None:
    """A float32 head from a bfloat16 checkpoint takes 2 bytes a value, and tied tables are held once."""
    _, packed = load(make_checkpoint(tmp_path, torch.bfloat16, tied), torch.float32)
    assert isinstance(packed, PackedHeadWeights)
    assert packed.lm_head.format is packed.embed_tokens.format is WeightFormat.BFLOAT16
    assert packed.vectors.norm is not None
    assert packed.vectors.norm.dtype == torch.float32
    assert (packed.lm_head is packed.embed_tokens) == tied


def test_other_dtypes_stay_plain(tmp_path: Path) -> None:
    """There is no packed format for float16."""
    _, weights = load(make_checkpoint(tmp_path, torch.float16, True), torch.float16)
    assert isinstance(weights, HeadWeights)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_cast_becomes_plain(tmp_path: Path, tied: bool) -> None:
    """``to`` another dtype gives tensors of that dtype; to the same one changes nothing."""
    _, weights = load(make_checkpoint(tmp_path, torch.bfloat16, tied), torch.float32)
    head = LocalHead(weights, RULE)
    expected = head.embed_tokens.weight
    assert isinstance(head.to(torch.float32).lm_head, PackedOutput)
    head.to(torch.float16)
    assert isinstance(head.lm_head, torch.nn.Linear)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float16}
    assert (head.lm_head.weight is head.embed_tokens.weight) == tied
    assert_close(head.embed_tokens.weight.float(), expected, 1e-3, 1e-3, "table")


@pytest.mark.parametrize("index", [-1, 258])
def test_an_unknown_token_is_refused(tmp_path: Path, index: int) -> None:
    """As by torch's embedding."""
    _, weights = load(make_checkpoint(tmp_path, torch.bfloat16, True), torch.float32)
    with pytest.raises(IndexError, match=f"row {index}: there are 258"):
        LocalHead(weights, RULE).embed_tokens(torch.tensor([index]))
