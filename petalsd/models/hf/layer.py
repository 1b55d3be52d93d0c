"""One decoder layer of transformers: built on the meta device, then given its tensors, and no others."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petalsd.errors import ModelError, WeightsError
from petalsd.models.hf.attention import ATTENTION_NAME, register_attention
from petalsd.models.hf.config_faults import made_from
from petalsd.models.hf.family import Family, packable_linears
from petalsd.models.hf.fp8 import with_scales
from petalsd.models.hf.parts import Part, RowsPart, Shape
from petalsd.models.source import ModelSource
from petalsd.models.weights import read_tensors
from petalsd.ops.memory import empty
from petalsd.ops.staging import copying_to

_EAGER = "eager"
"""transformers' own way to compute attention, and experts."""


@dataclass(frozen=True, slots=True)
class Layers:
    """How the decoder layers of one model are made; ``hf`` is transformers' config of it."""

    family: Family
    hf: Any

    def empty_layer(self, index: int, *, is_plain: bool = False) -> nn.Module:
        """Layer ``index`` without data; ``is_plain`` leaves the attention as transformers has it.

        ModelError where transformers cannot make it.
        """
        family = self.family
        layer_class: type[nn.Module] = getattr(family.module, family.layer)
        register_attention()  # after it: nearly all that both import comes with the module
        hf = copy.copy(self.hf)
        hf._attn_implementation = _EAGER if is_plain or family.adapt else ATTENTION_NAME
        hf._experts_implementation = _EAGER
        with torch.device("meta"):
            layer = made_from(hf, f"block {index}", lambda hf: layer_class(hf, layer_idx=index))
            if family.adapt is not None and not is_plain:
                family.adapt(layer, hf, index)
            if family.experts is not None and not is_plain:
                family.experts.replace_in(layer)
        return layer.eval().requires_grad_(False)

    def kind(self, index: int) -> str:
        """Blocks of one kind differ in their weights alone. ModelError where the config does not say it."""
        return made_from(self.hf, f"block {index}", lambda hf: self.family.kind(hf, index))

    def layer_type(self, index: int) -> str | None:
        """What the config calls the layer's attention, if it tells layers apart."""
        layer_types = getattr(self.hf, "layer_types", None)
        return layer_types[index] if layer_types else None

    def shapes(self, index: int) -> list[tuple[int, ...]]:
        """Of the tensors in a checkpoint, each expert's apart, and of its packed ones what they unpack to."""
        parts = self._parts(self.empty_layer(index), "")
        return [shape for group in parts.values() for part in group for shape in part.pieces]

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """The linear modules by their names in the layer, ``[out, in]``; experts and routers are none."""
        linears = packable_linears(self.empty_layer(index), self.family.experts)
        return {name: (module.out_features, module.in_features) for name, module in linears.items()}

    def tensor_shapes(self, index: int, source: ModelSource) -> dict[str, tuple[int, ...]]:
        """Names and shapes in the checkpoint. WeightsError when none of the family's spellings is there."""
        parts = self._parts(self.empty_layer(index), self._prefix(index, source), source.index())
        return _stored(part for group in parts.values() for part in group)

    def load(
        self,
        source: ModelSource,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_plain: bool = False,
    ) -> nn.Module:
        """Layer ``index`` with its weights in ``dtype`` on ``device``. WeightsError, or ModelError."""
        layer = self.empty_layer(index, is_plain=is_plain)
        parts = self._parts(layer, self._prefix(index, source), source.index())
        every = [part for group in parts.values() for part in group]
        dtypes = {name: dtype for part in every for name, dtype in part.dtypes.items()}
        mapped = read_tensors(source, _stored(every), dtypes)
        state = {}
        with copying_to(device) as copy_weight:
            for name, tensor in layer.state_dict().items():
                state[name] = empty(tensor.shape, self._dtype_of(name, dtype), device)
                for part in parts[name]:
                    part.copy_to(state[name], mapped.__getitem__, copy_weight)
        layer.load_state_dict(state, strict=True, assign=True)
        return _finished(layer)

    def random(self, index: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Layer ``index`` with weights that mean nothing."""
        layer = self.empty_layer(index)
        state = {}
        for name, tensor in layer.state_dict().items():
            drawn = torch.empty(tensor.shape, dtype=self._dtype_of(name, dtype), device=device)
            state[name] = drawn.normal_(0.0, 0.02)
        layer.load_state_dict(state, strict=True, assign=True)
        return _finished(layer)

    def cast(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The layer with its tensors in ``dtype``, changed in place, but for those that are always float32."""
        kept = {name: tensor for name, tensor in layer.state_dict().items() if name in self.family.float32}
        layer.to(dtype)
        layer.load_state_dict(kept, strict=False, assign=True)
        return layer

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if name in self.family.float32 else dtype

    def _prefix(self, index: int, source: ModelSource) -> str:
        names = source.index()
        for prefix in self.family.prefixes:
            if any(name.startswith(f"{prefix}{index}.") for name in names):
                return f"{prefix}{index}."
        raise WeightsError(
            f"{source.name}: no file holds tensors called {self.family.prefixes[0]}{index}.…",
            hint="the checkpoint and its config.json do not belong together, or it is incomplete",
        )

    def _parts(self, layer: nn.Module, prefix: str, names: Collection[str] = ()) -> dict[str, list[Part]]:
        """What each of the layer's tensors is put together from; ``names`` are those of the checkpoint."""
        experts, parts = self.family.experts, {}
        for name, tensor in layer.state_dict().items():
            shape = tuple(tensor.shape)
            of_experts = experts.parts(self.hf, prefix, name, shape) if experts is not None else None
            group = of_experts or [RowsPart((prefix + self._file_name(name),), shape)]
            parts[name] = [with_scales(part, self.hf, names) for part in group]
        return parts

    def _file_name(self, name: str) -> str:
        for ours, theirs in (self.family.renames or {}).items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


def _stored(parts: Iterable[Part]) -> dict[str, Shape]:
    return {name: shape for part in parts for name, shape in part.stored.items()}


def _finished(layer: nn.Module) -> nn.Module:
    """The layer without gradients; ModelError when something in it has no data, which no checkpoint would give."""
    missing = [name for name, tensor in layer.named_buffers() if tensor.is_meta]
    if missing:
        raise ModelError(f"{type(layer).__name__} computes {', '.join(missing)} where it is built")
    return layer.requires_grad_(False)
