"""What transformers' own model code does to hidden states between any two of its layers: masks, angles and all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petalsd.types import BlockSpan


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, wherever the family keeps them."""
    count = model.config.num_hidden_layers
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return lists[0]


def through_layers(model: PreTrainedModel, hidden: torch.Tensor, span: BlockSpan) -> torch.Tensor:
    """The states after the layers of ``span`` for ``hidden`` ``[B, n, M]`` from position 0; differentiable.

    The whole model runs, but the first layer of the span is given ``hidden``; the others' work is thrown away.
    """
    layers = decoder_layers(model)
    outputs: list[torch.Tensor] = []

    def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (hidden, *args[1:]), kwargs

    def catch(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [
        layers[span.start].register_forward_pre_hook(feed, with_kwargs=True),
        layers[span.end - 1].register_forward_hook(catch),
    ]
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs[0]
