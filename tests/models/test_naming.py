"""The swarm's name of a model, by family, and what cannot be a name."""

from __future__ import annotations

import pytest

from petalsd.errors import ConfigError
from petalsd.models.naming import dht_prefix


@pytest.mark.parametrize(
    ("model_type", "source", "expected"),
    [
        ("llama", "meta-llama/Meta-Llama-3.1-8B", "Meta-Llama-3-1-8B-hf"),
        ("llama", "meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf"),
        ("llama", "someone-else/Llama-2-7b-hf", "Llama-2-7b-hf"),
        ("llama", "gpt2-like", "gpt2-like-hf"),
        ("mistral", "mistralai/Mistral-7B-v0.3", "Mistral-7B-v0-3"),
        ("qwen2", "Qwen/Qwen2.5-7B-Instruct", "Qwen2-5-7B-Instruct"),
        ("qwen3", "Qwen/Qwen3-8B", "Qwen3-8B"),
        ("falcon", "tiiuae/falcon-180B-chat", "falcon-180B-chat"),
        ("bloom", "bigscience/bloom", "bigscience/bloom-petals"),
        ("bloom", "bigscience/bloom-petals", "bigscience/bloom-petals"),
        ("bloom", "somebody/bloom-7b1", "somebody/bloom-7b1-petals"),
        ("mixtral", "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0-1"),
        ("gemma2", "google/gemma-2-2b", "gemma-2-2b"),
    ],
)
def test_repositories_are_named_by_the_familys_rule(model_type: str, source: str, expected: str) -> None:
    """Dots become dashes, BLOOM and Mixtral keep the account, Llama ends in -hf and BLOOM in -petals."""
    assert dht_prefix(model_type, source, False, None) == expected


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", "smol-v1-5-hf"),
        ("qwen3", "smol-v1-5"),
        ("bloom", "smol-v1-5-petals"),
        ("mixtral", "smol-v1-5"),
    ],
)
@pytest.mark.parametrize("source", ["/models/smol-v1.5", "/models/smol-v1.5/", "/models/x/../smol-v1.5"])
def test_directories_are_named_like_repositories(model_type: str, expected: str, source: str) -> None:
    """A directory gives its own name, however its path is written."""
    assert dht_prefix(model_type, source, True, None) == expected


def test_an_explicit_prefix_is_taken_as_it_is() -> None:
    """No rule changes what was asked for; a leading underscore marks a private model."""
    assert dht_prefix("llama", "a/b", False, "_my/own-Name") == "_my/own-Name"


@pytest.mark.parametrize("prefix", ["", "a.b", "a b", "a\tb", "a\n"])
def test_prefixes_that_break_uids_are_refused(prefix: str) -> None:
    """A dot or white space would make a UID ambiguous."""
    with pytest.raises(ConfigError, match=r"model\.dht_prefix"):
        dht_prefix("llama", "a/b", False, prefix)


def test_a_directory_whose_name_cannot_be_a_prefix_needs_an_explicit_one() -> None:
    """A name with a space is refused with the key to set."""
    with pytest.raises(ConfigError, match=r"set model\.dht_prefix"):
        dht_prefix("qwen2", "/models/my model", True, None)
