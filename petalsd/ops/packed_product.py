"""Matrix products over weights that were brought into another form once, at load time."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from petalsd.ops.linear import linear
from petalsd.ops.packed_weight import WeightFormat
from petalsd.ops.weight_packing import pack_weight


class Product(Protocol):
    """A weight ``[out, in]`` in some form, and nothing beside it."""

    @property
    def nbytes(self) -> int: ...

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x @ weight.T + bias``; x ``[..., in]``, bias ``[out]``; differentiable with respect to ``x``."""


def can_pack(format: WeightFormat | None) -> bool:
    """Whether packing for this format helps on this processor; None: the weights are no packed ones."""
    if format is None or format.is_quantized:
        return format is not None
    if not torch._C._has_mkldnn:
        return False
    return format is WeightFormat.FLOAT32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_product(weight: torch.Tensor, format: WeightFormat) -> Product:
    """``weight`` in the form that serves best here; it is not kept."""
    return QuantizedProduct(weight, format) if format.is_quantized else OneDnnProduct(weight)


class QuantizedProduct:
    """In int8 or int4."""

    def __init__(self, weight: torch.Tensor, format: WeightFormat) -> None:
        self._weight = pack_weight(weight, format)
        self.nbytes = self._weight.nbytes

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, self._weight, bias)


class OneDnnProduct:
    """In oneDNN's own order. torch would bring a bfloat16 weight into that order again at every call."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.nbytes = weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._multiply(x, bias)
        rows = x.reshape(-1, self.shape[1])  # the result must be no view, or nobody could change it in place
        product: torch.Tensor = _Differentiable.apply(rows, self, bias)  # type: ignore[no-untyped-call]
        return product.view(*x.shape[:-1], self.shape[0])

    def unpack(self) -> torch.Tensor:
        """The weight as it was, in memory of its own."""
        weight: torch.Tensor = self._packed.to_dense()
        return weight

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.numel() == 0:  # oneDNN refuses it
            return x.new_empty(*x.shape[:-1], self.shape[0])
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return product


class _Differentiable(torch.autograd.Function):
    """Weights are frozen, so only the gradient of the input is computed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: OneDnnProduct, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return weight._multiply(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ ctx.weight.unpack(), None, None
