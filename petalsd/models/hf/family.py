"""What differs between transformers' families from where this engine stands: class names, tensor names, kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from petalsd.imports import import_heavy
from petalsd.models.head_rule import HeadRule
from petalsd.models.hf.parts import Part, RowsPart, Shape
from petalsd.models.model_config import windows_by_layer

LayerArguments: TypeAlias = dict[str, Any]


def no_arguments(hf: Any, num_tokens: int, dtype: torch.dtype) -> LayerArguments:
    """For layers that take the mask and the rotary angles alone."""
    return {}


def same_kind(hf: Any, index: int) -> str:
    """Blocks differ in their attention only: by ``layer_types``, if at all."""
    layer_types = getattr(hf, "layer_types", None)
    return str(layer_types[index]) if layer_types else "uniform"


def no_facts(hf: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a checkpoint names what newer transformers hold as one tensor for all experts of a block.

    module    the experts in the layer, whose parameters are ``gate_up_proj`` and ``down_proj``
    in_files  the same place in the files; ``<in_files>.<expert>.<gate|up|down>.weight`` are the tensors. None:
              files hold them as the module does
    router    the linear module that chooses experts, where it is one: it is neither packed nor adapted
    """

    module: str = "mlp.experts"
    in_files: str | None = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str | None = None

    def replace_in(self, layer: nn.Module) -> None:
        """Put another module in the place of transformers' experts, where those can neither be packed nor read."""

    def matrices(self, experts: Any) -> Iterator[torch.Tensor]:
        """Views of the weights in transformers' experts, ``[out, in]``."""
        for stack in (experts.gate_up_proj, experts.down_proj):
            yield from stack

    def parts(self, hf: Any, prefix: str, name: str, shape: Shape) -> list[Part] | None:
        """What tensor ``name`` of a layer is read from; None where that follows from its name, as of others.

        prefix  what the names in the files begin with
        """
        if self.in_files is None or not name.startswith(f"{self.module}."):
            return None
        spellings = (self.down,) if name.endswith("down_proj") else (self.gate, self.up)
        num_experts, rows, columns = shape
        in_files = f"{prefix}{self.in_files}"
        return [
            RowsPart(
                tuple(f"{in_files}.{number}.{spelling}.weight" for spelling in spellings),
                (rows // len(spellings), columns),
                number,
            )
            for number in range(num_experts)
        ]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table in ``families``.

    package    the classes are in ``transformers.models.<package>.modeling_<package>``
    layer      name of the decoder layer's class
    rotary     name of the class that computes rotary angles; None where positions enter in another way
    head       what stands around the blocks; UnsupportedModel where a client cannot have it
    prefixes   what comes before ``<index>.`` in the names of tensors: the first that a checkpoint uses
    renames    parts of a module's tensor names, and what the files have instead
    windows    each block's sliding window, from transformers' config: of what its model reads, not of all keys
    facts      fields of ModelConfig that the config spells differently
    kind       blocks of the same kind compute the same with other weights; the name is shown to people
    adapt      changes a layer on the meta device so that its attention comes to ``AttentionCall``; None where
               the attention can be registered
    plain_arguments  what the unchanged layer needs beside mask and angles
    quantized  ``quant_method`` of checkpoints that are read, as the values that they stand for
    float32    tensors of the layer that stay in float32 whatever is served in, as transformers keeps them
    """

    package: str
    layer: str
    rotary: str | None
    head: Callable[[Any], HeadRule]
    prefixes: tuple[str, ...] = ("model.layers.", "layers.")
    renames: Mapping[str, str] | None = None
    windows: Callable[[Any], tuple[int | None, ...]] = windows_by_layer
    facts: Callable[[Any], Mapping[str, Any]] = no_facts
    kind: Callable[[Any, int], str] = same_kind
    adapt: Callable[[nn.Module, Any, int], None] | None = None
    plain_arguments: Callable[[Any, int, torch.dtype], LayerArguments] = no_arguments
    experts: ExpertNames | None = None
    quantized: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()

    @property
    def module(self) -> ModuleType:
        """transformers' module with the classes; imported when it is first needed."""
        return import_heavy(f"transformers.models.{self.package}.modeling_{self.package}")


def packable_linears(layer: nn.Module, experts: ExpertNames | None) -> dict[str, nn.Linear]:
    """The linear modules of a layer by name, but for a router: rounded, it would choose other experts."""
    router = None if experts is None else experts.router
    modules = layer.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and name != router}
