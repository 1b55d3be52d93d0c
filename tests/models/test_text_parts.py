"""The text model in a model of text and images is served as if it were alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Gemma3Config, Mistral3Config, PreTrainedConfig

from petalsd.client.head import LocalHead
from petalsd.errors import ModelError, UnsupportedModel, WeightsError
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.head_weights import load_packed_head
from petalsd.models.ladder import Ladder
from petalsd.models.source import SINGLE_FILE, ModelSource
from petalsd.models.weight_storage import WeightStorage
from tests.adapter_files import draw_adapter, write_adapter
from tests.numeric import assert_close
from tests.tiny_models import HIDDEN_SIZE, LAYER_VARIANTS, make_tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 23)[None]
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TEXT: dict[str, tuple[str, type[PreTrainedConfig], dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        Gemma3Config,
        {**LAYER_VARIANTS["gemma3_text"][1], "tie_word_embeddings": True},
    ),
    "mistral3": ("mistral", Mistral3Config, {"head_dim": 16}),
    "mistral3-ministral3": ("ministral3", Mistral3Config, LAYER_VARIANTS["ministral3"][1]),
}


def make_whole(variant: str, path: Path) -> torch.nn.Module:
    """A tiny random model of text and images in ``path``."""
    family, config_class, settings = TEXT[variant]
    text = make_tiny(family, path / "text", **settings).config
    vision = {**VISION, "model_type": "siglip_vision_model" if family == "gemma3_text" else "pixtral"}
    config = config_class(
        text_config=text.to_dict(),
        vision_config=vision,
        tie_word_embeddings=text.tie_word_embeddings,
        mm_tokens_per_image=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(path)
    return model


def rename(path: Path, old: str, new: str) -> None:
    """What stands around the names of the text model."""
    tensors = load_file(path / SINGLE_FILE)
    renamed = {
        new + name.removeprefix(old) if name.startswith(old) else name: one for name, one in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path / SINGLE_FILE, metadata={"format": "pt"})


def logits(path: Path) -> torch.Tensor:
    """By our blocks and head, each block loaded as a server does."""
    source = ModelSource(str(path))
    architecture = Architecture.read(source.config())
    rule = architecture.head_rule()
    head = LocalHead(load_packed_head(source, architecture.config, rule, torch.float32), rule)
    ladder = Ladder(architecture, source, WeightStorage.choose(torch.float32, CPU), num_threads=1)
    with torch.inference_mode():
        states = head.entering(head.embed_tokens(IDS), 0)
        for index in range(architecture.config.num_blocks):
            states = ladder.load(index).forward_dense(states)
        return head.logits(states)


@pytest.mark.parametrize("variant", TEXT)
def test_text_alone_is_answered_as_by_the_whole(variant: str, tmp_path: Path) -> None:
    """Under the names that transformers writes, and under those of its newer modules."""
    model = make_whole(variant, tmp_path)
    with torch.inference_mode():
        expected = model(IDS, use_cache=False).logits
    assert_close(logits(tmp_path), expected, 1e-4, 1e-4, "logits")
    names = load_file(tmp_path / SINGLE_FILE)
    assert any(name.startswith("language_model.model.layers.") for name in names)
    rename(tmp_path, "language_model.model.", "model.language_model.")
    assert_close(logits(tmp_path), expected, 1e-4, 1e-4, "logits, other names")


def test_facts_are_those_of_the_text_model(tmp_path: Path) -> None:
    """The dtype is the whole's where the part names none; lacking tensors are named as they would be alone."""
    make_whole("mistral3", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for dtype in ("dtype", "torch_dtype"):
        raw["text_config"].pop(dtype, None)
    config = Architecture.read({**raw, "dtype": "bfloat16"}).config
    assert (config.model_type, config.hidden_size, config.dtype) == ("mistral", HIDDEN_SIZE, torch.bfloat16)
    tensors = load_file(tmp_path / SINGLE_FILE)
    del tensors["language_model.model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / SINGLE_FILE)
    source = ModelSource(str(tmp_path))
    with pytest.raises(
        WeightsError, match=r"no file holds the tensor model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        Ladder(Architecture.read(raw), source, WeightStorage.choose(torch.float32, CPU)).load(2)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"text_config": None}, ModelError, "text_config = None"),
        (
            {"text_config": {"model_type": "jamba"}},
            UnsupportedModel,
            "'jamba' is not served: some of its layers",
        ),
        ({"text_config": {}}, UnsupportedModel, "model_type = None"),
        (
            {"text_config": {"model_type": "mistral"}, "quantization_config": {"quant_method": "fp8"}},
            UnsupportedModel,
            "quant_method = 'fp8'",
        ),
    ],
)
def test_what_has_no_text_model_to_serve_is_refused(
    changes: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        Architecture.read({"model_type": "mistral3", **changes})


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    """Which of the two transformers would take is chance; both are named."""
    make_whole("gemma3", tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    one = next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight"))
    other = "model.language_model.layers.2.mlp.up_proj.weight"
    save_file({**tensors, other: torch.zeros_like(tensors[one])}, tmp_path / SINGLE_FILE)
    with pytest.raises(WeightsError, match=r"model\.layers\.2\.mlp\.up_proj\.weight twice, as ") as caught:
        ModelSource(str(tmp_path)).index()
    assert one in caught.value.message and other in caught.value.message


IMAGE_TERMS = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_an_adapter_of_the_whole_is_one_of_the_text_model(prefix: str, tmp_path: Path) -> None:
    """As PEFT names modules of older and newer transformers; what it has for images changes no text.

    Patterns of its configuration are for the names that it was trained with.
    """
    architecture, source = _text_model(tmp_path)
    module = "layers.1.self_attn.q_proj"
    pattern = {"alpha_pattern": {f"^{prefix}{module}".replace(".", r"\."): 3}}
    text = draw_adapter(
        make_tiny("gemma3_text", tmp_path / "alone", **TEXT["gemma3"][2]), [f"model.{module}"]
    )
    whole = {name.replace("model.layers.", f"{prefix}layers.", 1): tensor for name, tensor in text.items()}
    whole[f"base_model.model.{IMAGE_TERMS}"] = torch.ones(4, 32)
    alone = write_adapter(tmp_path / "text_only", text, lora_alpha=3)
    together = write_adapter(tmp_path / "together", whole, **pattern)
    states = torch.randn(1, 5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))
    ladder = Ladder(architecture, source, WeightStorage.choose(torch.float32, CPU), 1)
    block = ladder.load(1)
    answers = []
    for path in (alone, together):
        adapted = ladder.adapt(block, Adapter.open(ModelSource(str(path)), architecture))
        assert adapted is not None
        answers.append(adapted.forward_dense(states))
    assert torch.equal(*answers) and not torch.equal(answers[0], block.forward_dense(states))


def test_an_adapter_for_images_alone_is_refused(tmp_path: Path) -> None:
    """It would change nothing that is served."""
    architecture, _ = _text_model(tmp_path)
    path = write_adapter(tmp_path / "mine", {f"base_model.model.{IMAGE_TERMS}": torch.ones(4, 32)})
    with pytest.raises(WeightsError, match="has tensors for images alone"):
        Adapter.open(ModelSource(str(path)), architecture)


def _text_model(path: Path) -> tuple[Architecture, ModelSource]:
    make_whole("gemma3", path)
    source = ModelSource(str(path))
    return Architecture.read(source.config()), source
