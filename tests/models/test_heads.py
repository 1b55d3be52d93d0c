"""What a client has around the blocks of every family, against transformers' whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from petalsd.client.head import LocalHead, PackedEmbedding, PackedOutput
from petalsd.errors import BadRequest, UnsupportedModel, WeightsError
from petalsd.models.architecture import Architecture
from petalsd.models.head_weights import load_packed_head
from petalsd.models.source import SINGLE_FILE, ModelSource
from tests.numeric import assert_close
from tests.reference_layers import decoder_layers
from tests.tiny_models import FAMILIES, LAYER_VARIANTS, make_tiny

IDS = torch.arange(3, 23)[None]
VARIANTS = {family: (family, {}) for family in FAMILIES} | LAYER_VARIANTS
VARIANTS["opt-plain-norms"] = ("opt", {**LAYER_VARIANTS["opt"][1], "layer_norm_elementwise_affine": False})


def load(path: Path) -> LocalHead:
    source = ModelSource(str(path))
    architecture = Architecture.read(source.config())
    rule = architecture.head_rule()
    return LocalHead(load_packed_head(source, architecture.config, rule, torch.float32), rule)


@torch.inference_mode()
def watch(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What enters the first layer, what leaves the last one, and the logits, in transformers."""
    entering, leaving = [], []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: Any, output: Any) -> None:
        leaving.append(output[0] if isinstance(output, tuple) else output)

    layers = decoder_layers(model)
    layers[0].register_forward_pre_hook(before, with_kwargs=True)
    layers[-1].register_forward_hook(after)
    logits = model(IDS, use_cache=False).logits
    return entering[0], leaving[0], logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_head_is_that_of_transformers(variant: str, tied: bool, tmp_path: Path) -> None:
    """On both sides of the blocks, with and without an output head of its own."""
    family, settings = VARIANTS[variant]
    entering, leaving, logits = watch(
        make_tiny(family, tmp_path, **{**settings, "tie_word_embeddings": tied})
    )
    head = load(tmp_path)
    with torch.inference_mode():
        assert_close(head.entering(head.embed_tokens(IDS), 0), entering, 1e-5, 1e-5, "entering")
        assert_close(head.logits(leaving), logits, 1e-4, 1e-4, "logits")


@pytest.mark.parametrize("variant", ["opt", "bloom"])
def test_a_sequence_goes_on_where_it_was(variant: str, tmp_path: Path) -> None:
    """In two steps as in one: learned positions count from what is behind a step."""
    make_tiny(variant, tmp_path, **LAYER_VARIANTS[variant][1])
    head = load(tmp_path)
    embeds = head.embed_tokens(IDS)
    halves = [head.entering(embeds[:, :9], 0), head.entering(embeds[:, 9:], 9)]
    assert torch.equal(torch.cat(halves, dim=1), head.entering(embeds, 0))


def test_learned_positions_have_an_end(tmp_path: Path) -> None:
    make_tiny("opt", tmp_path, **{**LAYER_VARIANTS["opt"][1], "max_position_embeddings": 24})
    head = load(tmp_path)
    embeds = head.embed_tokens(IDS)
    head.entering(embeds, 4)
    with pytest.raises(BadRequest, match=r"position.*25.*this model has 24 positions"):
        head.entering(embeds, 5)


@pytest.mark.parametrize("variant", ["bloom", "falcon", "gpt_neox", "opt", "phi"])
def test_checkpoints_of_the_bare_model(variant: str, tmp_path: Path) -> None:
    """Published without the outermost prefix, as BLOOM is."""
    family, settings = VARIANTS[variant]
    _, leaving, logits = watch(make_tiny(family, tmp_path, **{**settings, "tie_word_embeddings": True}))
    tensors = load_file(tmp_path / SINGLE_FILE)
    outermost = {"bloom": "transformer.", "falcon": "transformer.", "gpt_neox": "gpt_neox."}.get(
        family, "model."
    )
    renamed = {name.removeprefix(outermost): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with torch.inference_mode():
        assert_close(load(tmp_path).logits(leaving), logits, 1e-4, 1e-4, "logits")


@pytest.mark.parametrize("variant", ["bloom", "gemma", "gpt_neox", "llama"])
@pytest.mark.parametrize("has", ["two", "the same twice", "the output's"])
def test_tied_tables_are_those_that_the_checkpoint_has(variant: str, has: str, tmp_path: Path) -> None:
    """As in transformers: two that differ are two whatever config.json says, and either may stand for both."""
    family, settings = VARIANTS[variant]
    model = make_tiny(family, tmp_path, **{**settings, "tie_word_embeddings": True})
    (embeddings,) = model._tied_weights_keys.values()
    output = Architecture.read(ModelSource(str(tmp_path)).config()).head_rule().names.output
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors[output] = tensors[embeddings].clone()
    if has == "two":
        tensors[output] = tensors[output].flip(0)
    elif has == "the output's":
        del tensors[embeddings]
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    entering, leaving, logits = watch(loaded)
    head = load(tmp_path)
    assert isinstance(head.embed_tokens, PackedEmbedding) and isinstance(head.lm_head, PackedOutput)
    assert (head.lm_head.table is head.embed_tokens.table) == (has != "two")
    with torch.inference_mode():
        assert_close(head.entering(head.embed_tokens(IDS), 0), entering, 1e-5, 1e-5, "entering")
        assert_close(head.logits(leaving), logits, 1e-4, 1e-4, "logits")


def test_a_checkpoint_without_embeddings_is_refused(tmp_path: Path) -> None:
    make_tiny("bloom", tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    del tensors["transformer.word_embeddings.weight"]
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"no file holds the tensor transformer\.word_embeddings\.weight"):
        load(tmp_path)


def test_narrow_embeddings_are_refused() -> None:
    raw = {"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 512, "num_attention_heads": 16}
    with pytest.raises(UnsupportedModel, match=r"word_embed_proj_dim = 512.*1024, only"):
        Architecture.read(raw).head_rule()
