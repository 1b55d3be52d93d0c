"""The tokenizer of a model, and what it makes of a prompt or of the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from petalsd.errors import WeightsError


def load_tokenizer(source: str) -> Any:
    """A model's tokenizer, without code that the repository brings. Raises WeightsError."""
    try:
        # Unset, it would ask on the terminal whether to run that code.
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise WeightsError(f"{source} has no tokenizer that can be read: {_one_line(error)}") from error


def encode_text(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids ``[1, n]``."""
    input_ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"]
    return input_ids


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], hint: str = "") -> torch.Tensor:
    """Token ids ``[1, n]`` of messages with ``role`` and ``content``, and of the beginning of an answer.

    WeightsError, with ``hint``, where there is no chat template, or it fails.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        input_ids: torch.Tensor = encoded["input_ids"]
        return input_ids
    except Exception as error:  # templates are programs
        text = f"the model has no chat template that can be used: {_one_line(error)}"
        raise WeightsError(text, hint=hint) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
