"""What transformers' layers compute is made once for a model's files, and every start is compared with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from petalsd.config import Quantization
from petalsd.models import ladder as ladder_module
from petalsd.models import references as references_module
from petalsd.models.architecture import Architecture
from petalsd.models.block import TransformerBlock
from petalsd.models.ladder import Choice, Ladder, Rung
from petalsd.models.references import ReferenceStore, reference_key
from petalsd.models.source import SINGLE_FILE, ModelSource
from petalsd.models.trial import STEPS, Reference, Tokens
from petalsd.models.weight_storage import WeightStorage
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that transformers' layers computed references of."""
    indices: list[int] = []
    original = Ladder._reference

    def note(ladder: Ladder, tokens: Tokens, index: int) -> Reference:
        indices.append(index)
        return original(ladder, tokens, index)

    monkeypatch.setattr(Ladder, "_reference", note)
    return indices


def load_first(
    model: Path, store: Path, dtype: torch.dtype = torch.float32, quantization: Quantization = "none"
) -> Choice:
    """What a start chooses that loads block 0."""
    source, storage = ModelSource(str(model)), WeightStorage.choose(dtype, CPU, quantization)
    ladder = Ladder(Architecture.read(source.config()), source, storage, 1, ReferenceStore(store))
    ladder.load(0)
    (choice,) = ladder.choices.values()
    return choice


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral"])
@pytest.mark.parametrize(
    ("dtype", "quantization"), [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.float32, "int8")]
)
def test_the_next_start_compares_with_the_kept_reference(
    family: str, dtype: torch.dtype, quantization: Quantization, tmp_path: Path, made: list[int]
) -> None:
    """Its figures are those of the first one."""
    make_tiny(family, tmp_path / "model")
    first, second = (load_first(tmp_path / "model", tmp_path / "kept", dtype, quantization) for _ in range(2))
    assert made == [0]
    for trial in (first.taken, second.taken):
        assert (trial.rung, trial.tolerance, trial.error) == (
            first.taken.rung,
            first.taken.tolerance,
            first.taken.error,
        )


def test_a_block_that_is_wrong_is_noticed_at_every_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[int]
) -> None:
    """As when a kernel begins to compute wrongly; the reference is none the worse for it."""
    make_tiny("llama", tmp_path / "model")
    load_first(tmp_path / "model", tmp_path / "kept")
    original = ladder_module.load_block

    def load_wrong(*args: Any, **kwargs: Any) -> TransformerBlock:
        block = original(*args, **kwargs)
        block.weights.mlp_norm.mul_(1.01)
        return block

    monkeypatch.setattr(ladder_module, "load_block", load_wrong)
    choice = load_first(tmp_path / "model", tmp_path / "kept")
    assert [(trial.rung, trial.is_passed) for trial in choice.trials] == [
        (Rung.FUSED, False),
        (Rung.PACKED, True),
    ]
    assert made == [0]


def test_other_weights_dtypes_and_forms_have_references_of_their_own(tmp_path: Path, made: list[int]) -> None:
    make_tiny("llama", tmp_path / "model")
    load_first(tmp_path / "model", tmp_path / "kept")
    load_first(tmp_path / "model", tmp_path / "kept", torch.bfloat16)
    load_first(tmp_path / "model", tmp_path / "kept", quantization="int4")
    assert made == [0, 0, 0]
    make_tiny("llama", tmp_path / "model", rope_theta=5000.0)
    load_first(tmp_path / "model", tmp_path / "kept")
    assert made == [0, 0, 0, 0]
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_a_reference_of_weights_that_changed_unnoticed_is_made_anew(tmp_path: Path, made: list[int]) -> None:
    """The file system says that nothing changed; the block's own output says otherwise."""
    make_tiny("llama", tmp_path / "model")
    file = tmp_path / "model" / SINGLE_FILE
    before = file.stat()
    load_first(tmp_path / "model", tmp_path / "kept")
    tensors = load_file(file)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    choice = load_first(tmp_path / "model", tmp_path / "kept")
    assert [trial.rung for trial in choice.trials] == [Rung.FUSED]
    assert made == [0, 0]
    load_first(tmp_path / "model", tmp_path / "kept")
    assert made == [0, 0]


@pytest.mark.parametrize("content", [b"", b"not safetensors", None], ids=["empty", "text", "other"])
def test_a_damaged_file_counts_as_none(content: bytes | None, tmp_path: Path, made: list[int]) -> None:
    make_tiny("llama", tmp_path / "model")
    load_first(tmp_path / "model", tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    if content is None:
        save_file({"expected": torch.zeros(3, 3)}, file, {"tolerance": "0.1", "is_sparse": "false"})
    else:
        file.write_bytes(content)
    with capture_logs() as events:
        assert load_first(tmp_path / "model", tmp_path / "kept").taken.rung is Rung.FUSED
    assert [event["file"] for event in events if event["event"] == "reference_unreadable"] == [str(file)]
    assert made == [0, 0]
    load_first(tmp_path / "model", tmp_path / "kept")
    assert made == [0, 0]


def test_a_directory_that_cannot_be_written_is_done_without(tmp_path: Path, made: list[int]) -> None:
    make_tiny("llama", tmp_path / "model")
    (tmp_path / "kept").write_text("a file")
    with capture_logs() as events:
        for _ in range(2):
            assert load_first(tmp_path / "model", tmp_path / "kept").taken.rung is Rung.FUSED
    assert made == [0, 0]
    assert "reference_not_kept" in [event["event"] for event in events]


def test_those_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that died while it wrote leaves nothing for ever."""
    monkeypatch.setattr(references_module, "MAX_KEPT", 2)
    tokens = Tokens.draw(8, STEPS, CPU)
    entering = torch.cat(tokens.rows)
    reference = Reference(entering, entering + 1, is_sparse=False, tolerance=0.5)
    store = ReferenceStore(tmp_path)
    (tmp_path / "x.1.partial").touch()
    os.utime(tmp_path / "x.1.partial", (0, 0))
    for second, key in enumerate("ab", start=1):
        store.put(key, reference)
        os.utime(tmp_path / f"{key}.safetensors", (second, second))
    assert store.get("a", tokens) is not None  # used again, so the other is older
    store.put("c", reference)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c"]
    kept = store.get("c", tokens)
    assert kept is not None
    assert (kept.tolerance, kept.is_sparse) == (0.5, False)
    assert torch.equal(kept.expected, entering + 1)


def test_the_key_says_what_tokens_and_block_it_is_about(tmp_path: Path) -> None:
    make_tiny("llama", tmp_path)
    source, storage = ModelSource(str(tmp_path)), WeightStorage.choose(torch.float32, CPU)
    architecture = Architecture.read(source.config())
    tokens = Tokens.draw(architecture.config.hidden_size, STEPS, CPU)
    more = Tokens.draw(architecture.config.hidden_size, (*STEPS, (2, 2)), CPU)
    keys = {
        reference_key(architecture, source, storage, 0, tokens),
        reference_key(architecture, source, storage, 1, tokens),
        reference_key(architecture, source, storage, 0, more),
    }
    assert len(keys) == 3


def test_a_later_start_of_a_fused_family_does_without_transformers_layers(tmp_path: Path) -> None:
    """Which bring the compiler of torch along."""
    make_tiny("llama", tmp_path / "model")
    program = f"""
import sys
from pathlib import Path
from petalsd.imports import heavy_imports
with heavy_imports():
    import petalsd.daemon.assembly
import torch
from petalsd.models.architecture import Architecture
from petalsd.models.ladder import Ladder
from petalsd.models.references import ReferenceStore
from petalsd.models.source import ModelSource
from petalsd.models.weight_storage import WeightStorage
source = ModelSource({str(tmp_path / "model")!r})
storage = WeightStorage.choose(torch.float32, torch.device("cpu"))
store = ReferenceStore(Path({str(tmp_path / "kept")!r}))
Ladder(Architecture.read(source.config()), source, storage, 1, store).load(0)
names = ("torch._dynamo", "sympy", "transformers.models.llama.modeling_llama", "transformers.activations")
print([name for name in names if name in sys.modules])
"""
    load_first(tmp_path / "model", tmp_path / "kept")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), done.stderr
