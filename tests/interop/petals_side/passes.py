"""One forward and one backward pass through the swarm, with a prompt added to every block's input."""

from __future__ import annotations

from typing import Any

import torch
from job import connect, run
from safetensors.torch import save_file


def passes(
    swarm: dict[str, Any], batch: int, tokens: int, prefix: int, tensors: str, use_prompts: bool = True
) -> dict[str, Any]:
    """Write inputs, outputs and gradients to the safetensors file ``tensors``.

    hidden, output, grad_output, grad_hidden ``[batch, tokens, M]``; prompts, grad_prompts
    ``[num_blocks, batch, prefix, M]`` unless ``use_prompts`` is false; all float32.
    """
    blocks = connect(**swarm).transformer.h
    hidden_size = blocks.config.hidden_size
    hidden = torch.randn(batch, tokens, hidden_size, requires_grad=True)
    prompts = torch.randn(len(blocks), batch, prefix, hidden_size, requires_grad=True)
    grad_output = torch.randn(batch, tokens, hidden_size)

    output = blocks(hidden, prompts=prompts if use_prompts else None)
    output.backward(grad_output)

    results = {"hidden": hidden, "output": output, "grad_output": grad_output, "grad_hidden": hidden.grad}
    if use_prompts:
        results |= {"prompts": prompts, "grad_prompts": prompts.grad}
    save_file({name: tensor.detach().contiguous() for name, tensor in results.items()}, tensors)
    return {"shapes": {name: list(tensor.shape) for name, tensor in results.items()}}


run(passes)
