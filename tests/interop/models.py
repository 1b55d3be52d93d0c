"""A model as the interop tests use it: for petalsd, for stock Petals, and for transformers in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.interop.petals_model import make_petals_copy
from tests.tiny_models import make_tiny

PROMPT = [5, 99, 17, 203, 64, 8, 150]
# "The capital of France is" in the demo model's vocabulary; the tokenizers of Petals' day cannot read its file.
DEMO_PROMPT = [504, 3575, 282, 4649, 314]


@dataclass(frozen=True, slots=True)
class Model:
    """``petals_directory`` has the configuration in the old spelling; ``local`` computes in float32."""

    directory: Path
    petals_directory: Path
    local: PreTrainedModel
    dht_prefix: str

    @property
    def num_blocks(self) -> int:
        return int(self.local.config.num_hidden_layers)

    def swarm(self, initial_peers: list[str]) -> dict[str, Any]:
        """The argument ``swarm`` of the jobs in petals_side/."""
        return {
            "model": str(self.petals_directory),
            "initial_peers": initial_peers,
            "dht_prefix": self.dht_prefix,
        }


def random_llama(directory: Path, **overrides: Any) -> Model:
    """``overrides`` are keys of the configuration."""
    return random_model(directory, "llama", **overrides)


def random_model(directory: Path, family: str, **overrides: Any) -> Model:
    """``overrides`` are keys of the configuration."""
    local = make_tiny(family, directory / "model", **overrides)
    copy = make_petals_copy(directory / "model", directory / "petals")
    return Model(directory / "model", copy, local, f"{directory.name}-hf")


def open_model(source: Path, directory: Path) -> Model:
    """An existing model; ``directory`` gets its copy for Petals."""
    local = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    return Model(source, make_petals_copy(source, directory / "petals"), local, f"{directory.name}-hf")
