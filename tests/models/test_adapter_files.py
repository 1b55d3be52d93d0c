"""What is read of an adapter's files, from where, and what is refused with a word on what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from petalsd import _C
from petalsd.errors import WeightsError
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.contract import Block
from petalsd.models.ladder import Ladder, Rung
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
from petalsd.ops.packed_product import PackedProduct
from petalsd.types import BlockSpan
from tests.adapter_files import ALPHA, RANK, Tensors, draw_adapter, write_adapter
from tests.models.fake_hub import FakeHub
from tests.numeric import assert_close
from tests.reference_layers import through_layers
from tests.tiny_models import HIDDEN_SIZE, make_tiny

CPU = torch.device("cpu")
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
Q_A, Q_B = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")


class Llama:
    """A tiny model; tensors for two linear modules of its block 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reference = make_tiny("llama", path)
        self.source = ModelSource(str(path))
        self.architecture = Architecture.read(self.source.config())
        storage = WeightStorage.choose(torch.float32, CPU)
        self.block: Block = Ladder(self.architecture, self.source, storage, 1).build(Rung.FUSED, 1)
        self.tensors = draw_adapter(self.reference, [Q, DOWN])
        self.hidden = torch.randn(1, 7, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))

    def open(self, path: Path) -> Adapter:
        return Adapter.open(ModelSource(str(path)), self.architecture)

    def answer(self, adapter: Adapter) -> torch.Tensor:
        team = _C.LayerTeam(1, "auto")
        return adapter.adapt(self.block, lambda weight: PackedProduct(weight, team)).forward_dense(
            self.hidden
        )

    def merged_answer(self, scales: dict[str, float]) -> torch.Tensor:
        """Of transformers' layer with each module's term, so scaled, merged into its weight."""
        kept = {name: self.reference.get_submodule(name).weight for name in scales}
        for name, scale in scales.items():
            a, b = (self.tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            self.reference.get_submodule(name).weight = nn.Parameter(kept[name] + scale * b @ a)
        with torch.no_grad():
            answer = through_layers(self.reference, self.hidden, BlockSpan(1, 2))
        for name, weight in kept.items():
            self.reference.get_submodule(name).weight = weight
        return answer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("fields", "q_scale", "down_scale"),
    [
        ({}, ALPHA / RANK, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5, ALPHA / RANK**0.5),
        ({"alpha_pattern": {"down_proj": 1}}, ALPHA / RANK, 1 / RANK),
        ({"alpha_pattern": {r".*layers\.1\.self_attn\..*": 3, "own_proj": 9}}, 3 / RANK, ALPHA / RANK),
        ({"alpha_pattern": {"^" + Q.replace(".", r"\."): 3, "q_proj": 9}}, 3 / RANK, ALPHA / RANK),
        ({"r": 77, "rank_pattern": {"q_proj|down_proj": RANK}}, ALPHA / RANK, ALPHA / RANK),
        ({"lora_alpha": None, "init_lora_weights": "gaussian"}, 8 / RANK, 8 / RANK),
    ],
)
def test_scales(
    llama: Llama, tmp_path: Path, fields: dict[str, Any], q_scale: float, down_scale: float
) -> None:
    """Alpha over the rank or its root, both by name where the configuration tells modules apart."""
    path = write_adapter(tmp_path, llama.tensors, **fields)
    if fields.get("lora_alpha", 0) is None:
        raw = json.loads((path / "adapter_config.json").read_text())
        del raw["lora_alpha"]
        (path / "adapter_config.json").write_text(json.dumps(raw))
    expected = llama.merged_answer({Q: q_scale, DOWN: down_scale})
    assert_close(llama.answer(llama.open(path)), expected, 1e-4, 1e-4, str(fields))


@pytest.mark.parametrize(
    ("alpha", "a_factor", "found"),
    [(1e6, 1.0, r"lora_B\.weight, times 250000 in"), (ALPHA, 1e6, r"lora_A\.weight, in")],
)
def test_terms_that_leave_the_range_of_the_dtype_are_refused(
    llama: Llama, tmp_path: Path, alpha: float, a_factor: float, found: str
) -> None:
    """As float16 has a small one: they would make infinity of all that is asked for with the adapter."""
    tensors = {name: t * a_factor if ".lora_A." in name else t for name, t in llama.tensors.items()}
    adapter = llama.open(write_adapter(tmp_path / "mine", tensors, lora_alpha=alpha))
    storage = WeightStorage.choose(torch.float16, CPU)
    block = Ladder(llama.architecture, llama.source, storage, 1).build(Rung.FUSED, 1)
    with pytest.raises(WeightsError, match=rf"adapter mine: .*{found} torch\.float16, holds"):
        adapter.adapt(block, lambda weight: PackedProduct(weight, _C.LayerTeam(1, "auto")))


def test_ranks_differ_between_modules(llama: Llama, tmp_path: Path) -> None:
    """The largest block's tensors are what is planned for, each of its own rank."""
    tensors = draw_adapter(llama.reference, [Q]) | draw_adapter(llama.reference, [DOWN], rank=2)
    tensors |= draw_adapter(llama.reference, ["model.layers.3.self_attn.k_proj"])
    adapter = llama.open(write_adapter(tmp_path, tensors, rank_pattern={"mlp.down_proj": 2}))
    assert adapter.name == tmp_path.name
    assert adapter.max_block_nbytes(torch.bfloat16) == 2 * (4 * (64 + 64) + 2 * (160 + 64))
    assert torch.isfinite(llama.answer(adapter)).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", ""),
        ("base_model.model.model.", "base_model.model."),
        (".weight", ".default.weight"),
    ],
)
def test_other_spellings_of_names(llama: Llama, tmp_path: Path, old: str, new: str) -> None:
    """Without PEFT's prefix, of a model without its head, and with the name that PEFT gives to adapters."""
    tensors = {name.replace(old, new): tensor for name, tensor in llama.tensors.items()}
    expected = llama.answer(llama.open(write_adapter(tmp_path / "usual", llama.tensors)))
    assert torch.equal(llama.answer(llama.open(write_adapter(tmp_path / "other", tensors))), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3': only LORA"),
        ({"use_dora": True}, "use_dora = True"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'.*convert it"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"r": 0}, "r = 0: a rank is a whole number from 1"),
        ({"r": 4.0}, r"r = 4\.0: a rank"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern = 0: a rank"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern = \['q_proj'\]: not a JSON object"),
        ({"alpha_pattern": {"q_proj(": 8}}, "alpha_pattern = .*: not regular expressions"),
        ({"lora_alpha": "16"}, "lora_alpha = '16': alpha is a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan: alpha"),
        ({"lora_alpha": 1e39}, r"lora_alpha = 1e\+39: alpha is a finite number, at most 1e\+06"),
        ({"lora_alpha": 10**400}, r"lora_alpha = 1000.*: alpha"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, r"alpha_pattern = -1000.*: alpha"),
        ({"use_rslora": "no"}, "use_rslora = 'no': true or false"),
        ({"r": 8}, r"q_proj\.lora_A\.weight of shape \(4, 64\), the model and rank 8 mean \(8, 64\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_refused(
    llama: Llama, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    """The error names adapter, field and value, and says what to do."""
    only_q = {name: llama.tensors[name] for name in (Q_A, Q_B)}
    with pytest.raises(WeightsError, match=f"adapter mine: .*{message}") as caught:
        llama.open(write_adapter(tmp_path / "mine", only_q, **fields))
    assert caught.value.hint


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """By short names: A and B are those of q_proj."""
    names = {"A": Q_A, "B": Q_B, "C": Q_A.replace("A.weight", "A.default.weight")}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


BAD = torch.full((RANK, HIDDEN_SIZE), torch.inf)
PREFIX = "base_model.model.model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(B=None), r"has .*q_proj\.lora_A\.weight, but no lora_B beside"),
        (changed(A=None), r"has .*q_proj\.lora_B\.weight, but no lora_A beside"),
        (changed(A=torch.ones(RANK, 63)), r"lora_A\.weight of shape \(4, 63\), .* rank 4 mean \(4, 64\)"),
        (changed(B=torch.ones(65, RANK)), r"lora_B\.weight of shape \(65, 4\), .* mean \(64, 4\)"),
        (changed(A=torch.ones(RANK)), r"lora_A\.weight of shape \(4,\)"),
        (changed(A=torch.ones(0, HIDDEN_SIZE)), r"of shape \(0, 64\)"),
        (changed(A=BAD), rf"{Q_A} holds values that are not finite"),
        (changed(A=BAD * torch.nan), rf"{Q_A} holds values that are not finite"),
        (changed(A=torch.ones(RANK, HIDDEN_SIZE, dtype=torch.int8)), rf"{Q_A} has dtype torch\.int8"),
        (changed(C=torch.ones(RANK, HIDDEN_SIZE)), r"which mean the same"),
        ({f"layers.1.{Q_A.partition('.1.')[2]}": torch.ones(RANK, HIDDEN_SIZE)}, r"which mean the same"),
        ({f"{PREFIX}.embed_tokens.lora_embedding_A": torch.ones(4, 256)}, "embed_tokens.lora_embedding_A, which"),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, r"lm_head\.lora_A\.weight, which is no"),
        ({f"{PREFIX}.layers.0.input_layernorm.weight": torch.ones(64)}, r"0\.input_layernorm\.weight, which"),
        ({f"{PREFIX}.layers.0.mlp.x.lora_A.weight": torch.ones(4, 64)}, r"modules of block 0 are self_attn\.q"),
        ({f"{Q_A.removesuffix('A.weight')}magnitude_vector": torch.ones(64)}, r"magnitude_vector, which is no"),
        ({f"{PREFIX}.layers.4.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, "but the model has 4 blocks"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(
    llama: Llama, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    """The error names adapter, file and tensor, and says what to do."""
    tensors = {name: tensor for name, tensor in {**llama.tensors, **change}.items() if tensor is not None}
    with pytest.raises(WeightsError, match=rf"adapter mine: adapter_model\.safetensors.*{message}") as caught:
        llama.open(write_adapter(tmp_path / "mine", tensors))
    assert caught.value.hint


def test_experts_are_refused(tmp_path: Path) -> None:
    """Whether they are named as single modules, as checkpoints do, or as what holds them all."""
    reference = make_tiny("mixtral", tmp_path / "model", num_local_experts=4)
    architecture = Architecture.read(ModelSource(str(tmp_path / "model")).config())
    tensors = draw_adapter(reference, ["model.layers.1.self_attn.q_proj"])
    for name in ("block_sparse_moe.experts.3.w1", "mlp.experts.gate_up_proj", "mlp.gate"):
        path = write_adapter(tmp_path / "mine", _renamed(tensors, name))
        with pytest.raises(WeightsError, match=rf"{name}\.lora_A.*experts of sparse layers are not adapted"):
            Adapter.open(ModelSource(str(path)), architecture)


def _renamed(tensors: Tensors, module: str) -> Tensors:
    return {name.replace("self_attn.q_proj", module): tensor for name, tensor in tensors.items()}


def test_files_that_are_refused(llama: Llama, tmp_path: Path) -> None:
    """None, damaged ones, pickles, and one without tensors."""
    with pytest.raises(WeightsError, match=r"adapter_config\.json is missing in"):
        llama.open(llama.path)
    path = write_adapter(tmp_path / "mine", llama.tensors)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(WeightsError, match=r"adapter mine: adapter_model\.safetensors has no valid"):
        llama.open(path)
    save_file({}, file)
    with pytest.raises(WeightsError, match=r"adapter mine: adapter_model\.safetensors has no tensors"):
        llama.open(path)
    file.unlink()
    with pytest.raises(WeightsError, match=r"mine has no adapter_model\.safetensors"):
        llama.open(path)
    (path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(
        WeightsError, match=r"mine has weights in pickle files only.*peft, and call save_pretrained"
    ):
        llama.open(path)
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"adapter_config\.json of mine is not a JSON object"):
        llama.open(path)


@pytest.fixture
def hub(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(write_adapter(tmp_path / "repository", llama.tensors))
    (fake.directory / "README.md").write_text("an adapter")
    fake.start()
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
    yield fake
    fake.stop()


def test_an_adapter_from_the_hub(llama: Llama, hub: FakeHub, tmp_path: Path) -> None:
    """Its two files are downloaded, once; what was evicted meanwhile is brought again when a block needs it."""
    source = ModelSource(FakeHub.repository, cache_dir=tmp_path / "cache")
    adapter = Adapter.open(source, llama.architecture)
    assert adapter.name == FakeHub.repository
    expected = llama.answer(llama.open(hub.directory))
    assert torch.equal(llama.answer(adapter), expected)
    again = ModelSource(FakeHub.repository, cache_dir=tmp_path / "cache", offline=True)
    assert torch.equal(llama.answer(Adapter.open(again, llama.architecture)), expected)
    assert sorted(hub.downloads) == [("adapter_config.json", 0), ("adapter_model.safetensors", 0)]
    source.path("adapter_model.safetensors").unlink()
    assert torch.equal(llama.answer(adapter), expected)


def test_a_repository_without_an_adapter(llama: Llama, hub: FakeHub, tmp_path: Path) -> None:
    """The error names the file that is not there."""
    (hub.directory / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match=r"acme/tiny has no file adapter_config\.json"):
        Adapter.open(ModelSource(FakeHub.repository, cache_dir=tmp_path / "cache"), llama.architecture)
