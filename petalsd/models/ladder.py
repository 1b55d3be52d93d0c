"""Three ways to compute a block: the fastest one is taken that a comparison with transformers' layer permits."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import TYPE_CHECKING

import structlog
import torch
from torch import nn

from petalsd.device_faults import raise_if_lost
from petalsd.errors import ModelError, PetalsdError
from petalsd.models.adapters import Adapter
from petalsd.models.architecture import Architecture
from petalsd.models.block import TransformerBlock
from petalsd.models.contract import Angles, Block
from petalsd.models.cpu_products import CpuProducts
from petalsd.models.hf.angles import LayerAngles
from petalsd.models.hf.block import LayerBlock
from petalsd.models.hf.config_faults import reason_of
from petalsd.models.hf.norms import replace_norms
from petalsd.models.hf.packing import pack_layer, round_layer
from petalsd.models.native_span import NativeSpan, can_attend_natively, can_be_native
from petalsd.models.paged_span import BlockByBlock
from petalsd.models.references import ReferenceStore, reference_key
from petalsd.models.rope import Rope
from petalsd.models.source import ModelSource
from petalsd.models.spans import has_kernels, paged_span
from petalsd.models.trial import MANY_ROWS, STEPS, Reference, Tokens
from petalsd.models.weight_storage import WeightStorage
from petalsd.models.weights import load_block
from petalsd.ops.packed_product import Product
from petalsd.ops.packed_weight import PackedWeight
from petalsd.ops.weight_packing import pack_weight

if TYPE_CHECKING:
    from petalsd.models.gpu_products import GpuProducts

log = structlog.get_logger(__name__)


class Rung(StrEnum):
    """FUSED: our own block; PACKED: transformers' layer over packed weights; PLAIN: transformers' layer.

    Attention and cache are ours on all of them.
    """

    FUSED = "fused"
    PACKED = "packed"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Trial:
    """How a rung did. ``error`` and ``tolerance`` as ``trial`` defines them; ``kernels`` is what computed.

    uses_kernels  whether a layer may attend by kernels, as ``LayerBlock`` has it
    """

    rung: Rung
    kernels: str
    error: float
    tolerance: float
    duration_s: float
    uses_kernels: bool = True

    @property
    def is_passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Choice:
    """The trials of a kind of blocks, in their order; the last one passed and is what serves."""

    kind: str
    trials: tuple[Trial, ...]

    @property
    def taken(self) -> Trial:
        return self.trials[-1]


class Ladder:
    """Loads the blocks of one model. ``choices``, by kind of block, fill as the first block of a kind is loaded.

    num_threads  of the processor, for the kernels that are tried and for the products of packed layers
    references   kept ones are compared with, and new ones put there
    """

    def __init__(
        self,
        architecture: Architecture,
        source: ModelSource,
        storage: WeightStorage,
        num_threads: int = 0,
        references: ReferenceStore | None = None,
    ) -> None:
        self.architecture = architecture
        self.storage = storage
        self.angles = make_angles(architecture, storage.dtype, storage.device)
        self._source = source
        self._num_threads = num_threads or torch.get_num_threads()
        self._references = references or ReferenceStore()
        self._choices: dict[str, Choice] = {}

    @property
    def choices(self) -> Mapping[str, Choice]:
        return self._choices

    def load(self, index: int) -> Block:
        """Block ``index`` on the rung of its kind. WeightsError, or ModelError when no rung is right."""
        kind = self.architecture.kind(index)
        choice = self._choices.get(kind)
        if choice is not None:
            return self.build(choice.taken.rung, index, uses_kernels=choice.taken.uses_kernels)
        choice, block = self._climb(kind, index)
        self._choices[kind] = choice
        return block

    def build(self, rung: Rung, index: int, *, uses_kernels: bool = True) -> Block:
        """Block ``index`` on this rung, untried."""
        architecture, storage = self.architecture, self.storage
        if rung is Rung.FUSED:
            assert architecture.fused is not None and isinstance(self.angles, Rope)
            fused = load_block(
                self._source,
                architecture.fused,
                index,
                storage.dtype,
                storage.device,
                rope=self.angles,
                quantization=storage.quantization,
            )
            self._equip(fused)
            return fused
        # What is rounded to a few bits is rounded from the checkpoint's values.
        dtype = torch.float32 if rung is Rung.PACKED and self._is_quantized else storage.dtype
        layer = architecture.layers.load(self._source, index, dtype, storage.device)
        if rung is Rung.PACKED:
            self._pack(layer)
        block = self._as_block(architecture.layers.cast(layer, storage.dtype), index)
        if not uses_kernels:
            block.leave_kernels()
        return block

    def random_layer(self, index: int) -> Block:
        """As block ``index`` is computed where nothing is fused, with weights that mean nothing."""
        layer = self.architecture.layers.random(index, self.storage.dtype, self.storage.device)
        if self.storage.format is not None:
            self._pack(layer)
        return self._as_block(layer, index)

    def adapt(self, block: Block, adapter: Adapter) -> Block | None:
        """``Adapter.adapt``, computed as this device can."""
        adapted = adapter.adapt(block, self.make_product)
        if isinstance(adapted, TransformerBlock | LayerBlock):
            self._equip(adapted)
        return adapted

    def candidates(self) -> list[Rung]:
        """What can be tried here, the best first. A plain layer would take more memory than quantized weights."""
        fused = [Rung.FUSED] if self.architecture.fused is not None else []
        packed = [] if self.storage.format is None else [Rung.PACKED]
        plain = [] if self._is_quantized else [Rung.PLAIN]
        return [*fused, *packed, *plain]

    @property
    def _is_quantized(self) -> bool:
        return self.storage.format is not None and self.storage.format.is_quantized

    @cached_property
    def _products(self) -> CpuProducts | GpuProducts:
        """What computes with the weights of layers, one after the other."""
        device = self.storage.device
        return CpuProducts(self._num_threads) if device.type == "cpu" else gpu_products(device)

    def _pack(self, layer: nn.Module) -> None:
        assert self.storage.format is not None
        pack_experts = partial(self._products.pack_experts, format=self.storage.format)
        pack_layer(layer, self.architecture.layers.family.experts, self._make_product, pack_experts)

    def make_product(self, weight: PackedWeight) -> Product:
        """What multiplies with a packed weight on the blocks' device."""
        return self._products.product(weight)

    def _make_product(self, weight: torch.Tensor) -> Product:
        assert self.storage.format is not None
        return self.make_product(pack_weight(weight.cpu(), self.storage.format).to(self.storage.device))

    def _as_block(self, layer: nn.Module, index: int) -> LayerBlock:
        names = self.architecture.layers.family.experts
        if names is not None:
            self._products.replace_experts(layer, names)
        replace_norms(layer, self._products.norm)
        angles, part = self.angles, slice(0, 2)
        if isinstance(angles, LayerAngles):
            part = angles.slice_of(self.architecture.layers.layer_type(index))
        block = LayerBlock(index, self.architecture.config, layer, angles, part)
        self._equip(block)
        return block

    def _equip(self, block: TransformerBlock | LayerBlock) -> None:
        """With what attends on a CPU where steps are not computed as a whole."""
        if (
            can_attend_natively(block)
            and not can_be_native(block)
            and isinstance(self._products, CpuProducts)
        ):
            block.team = self._products.team

    def _climb(self, kind: str, index: int) -> tuple[Choice, Block]:
        device = self.storage.device
        steps = STEPS if device.type == "cpu" else (*STEPS, MANY_ROWS)
        tokens = Tokens.draw(self.architecture.config.hidden_size, steps, device)
        key = reference_key(self.architecture, self._source, self.storage, index, tokens)
        kept = self._references.get(key, tokens)
        if kept is not None:
            trials, block = self._try_all(kind, index, tokens, kept)
            if block is not None:
                return Choice(kind, trials), block
        reference = self._reference(tokens, index)
        _check_finite(reference, f"block {index} ({kind})", self.storage.dtype)
        trials, block = self._try_all(kind, index, tokens, reference)
        if block is not None:
            self._references.put(key, reference)
            return Choice(kind, trials), block
        raise ModelError(
            f"block {index} ({kind}) does not compute what transformers' layer does: "
            f"its error is {trials[-1].error:.2g}, {trials[-1].tolerance:.2g} is tolerated",
            hint="this version of transformers, or this processor, does something that petalsd does not know",
        )

    def _try_all(
        self, kind: str, index: int, tokens: Tokens, reference: Reference
    ) -> tuple[tuple[Trial, ...], Block | None]:
        """The trials up to the first one that is passed, and its block; None where there is none."""
        trials: list[Trial] = []
        for rung in self.candidates():
            for block in self._ways(rung, index):
                trials.append(self._try(rung, block, tokens, reference))
                trial = trials[-1]
                fields = {"block": index, "kind": kind, "path": rung.value, "kernels": trial.kernels}
                if trial.is_passed:
                    log.info(
                        "block_path_chosen", **fields, numeric_error=trial.error, tolerance=trial.tolerance
                    )
                    return tuple(trials), block
                log.warning(
                    "block_path_rejected", **fields, numeric_error=trial.error, tolerance=trial.tolerance
                )
                del block  # before the next one takes memory
        return tuple(trials), None

    def _ways(self, rung: Rung, index: int) -> Iterator[Block]:
        """The block on this rung; a layer then once more, without kernels for attention, norms and experts."""
        block = self.build(rung, index)
        yield block
        if isinstance(block, LayerBlock):
            block.leave_kernels()
            yield block

    def _reference(self, tokens: Tokens, index: int) -> Reference:
        """By the unchanged layer, with quantized weights by one whose weights have their values.

        For a moment it takes the memory of one block in float32.
        """
        config, layers, storage = self.architecture.config, self.architecture.layers, self.storage
        layer = layers.load(self._source, index, torch.float32, storage.device, is_plain=True)
        if storage.format is not None and self._is_quantized:
            round_layer(layer, layers.family.experts, storage.format)
        dtype, is_sparse = storage.dtype, layers.family.experts is not None
        with _named(f"block {index} ({self.architecture.kind(index)})"):
            wide = tokens.through_layer(layer, layers, config, index, torch.float32)
        narrow = wide
        if dtype != torch.float32:
            narrow = tokens.through_layer(layers.cast(layer, dtype), layers, config, index, dtype)
        return Reference.of(tokens, wide, narrow, dtype, is_sparse=is_sparse, is_quantized=self._is_quantized)

    def _try(self, rung: Rung, block: Block, tokens: Tokens, reference: Reference) -> Trial:
        started = time.monotonic()
        try:
            outputs = (
                tokens.through_pages(block, self.angles, self._num_threads),
                tokens.through_passes(block),
            )
            error = max(reference.error_of(output) for output in outputs)
        except (MemoryError, torch.OutOfMemoryError):  # says nothing about the rung
            raise
        except Exception as reason:
            raise_if_lost(reason)
            log.warning("block_path_failed", block=block.index, path=rung.value, exc_info=reason)
            error = math.inf
        duration_s = time.monotonic() - started
        uses_kernels = not isinstance(block, LayerBlock) or block.uses_kernels
        return Trial(rung, self._kernels(rung, block), error, reference.tolerance, duration_s, uses_kernels)

    def _kernels(self, rung: Rung, block: Block) -> str:
        if rung is Rung.PACKED:
            tier = self._products.tier
            return tier if has_kernels(block) else f"{tier}, torch"
        span = paged_span({block.index: block}, self._num_threads)
        if isinstance(span, NativeSpan):
            return span.tier
        return "torch" if isinstance(span, BlockByBlock) else "triton"


@contextlib.contextmanager
def _named(block: str) -> Iterator[None]:
    """ModelError, about ``block``, for what its layer raises over sizes and options that do not fit together."""
    try:
        yield
    except (PetalsdError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise_if_lost(error)
        raise ModelError(
            f"{block} cannot be computed by transformers' own layer: {reason_of(error)}",
            hint="its config.json is damaged: correct the file, or use another revision of the model",
        ) from error


def _check_finite(reference: Reference, block: str, dtype: torch.dtype) -> None:
    """ModelError where transformers' own layer makes what nothing can be compared with."""
    if not reference.is_finite:
        raise ModelError(
            f"{block} makes values that are not finite, by transformers' own layer in float32",
            hint="its config.json or its weights are damaged: use another revision",
        )
    if not math.isfinite(reference.tolerance):
        name = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"{block} makes values that are not finite in {name}",
            hint="set model.dtype to bfloat16 or float32",
        )


def gpu_products(device: torch.device) -> GpuProducts:
    """Imports Triton, which a machine without a GPU need not have."""
    from petalsd.models.gpu_products import GpuProducts

    return GpuProducts.of(device)


def make_angles(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> Angles:
    """What the blocks of a model share, whichever rung each is on."""
    if architecture.fused is not None:
        return Rope(architecture.fused, dtype, device)
    layers = architecture.layers
    return LayerAngles(layers.family, layers.hf, architecture.config, dtype, device)
