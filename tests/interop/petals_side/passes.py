"""One forward and one backward pass through the swarm, with a prompt added to every block's input."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from swarm_model import connect


def passes(swarm: dict[str, Any], inputs: str, results: str) -> dict[str, Any]:
    """Read tensors from the safetensors file ``inputs``, write those computed to ``results``; all float32.

    inputs     hidden, grad_output ``[B, n, M]``; prompts ``[num_blocks, B, prefix, M]`` may be missing
    results    output, grad_hidden ``[B, n, M]``; grad_prompts like prompts
    """
    tensors = load_file(inputs)
    blocks = connect(swarm).transformer.h
    hidden, prompts = tensors["hidden"].requires_grad_(), tensors.get("prompts")
    if prompts is not None:
        prompts.requires_grad_()
    output = blocks(hidden, prompts=prompts)
    output.backward(tensors["grad_output"])
    computed = {"output": output.detach(), "grad_hidden": hidden.grad}
    if prompts is not None:
        computed["grad_prompts"] = prompts.grad
    save_file({name: tensor.to(torch.float32).contiguous() for name, tensor in computed.items()}, results)
    return {}
