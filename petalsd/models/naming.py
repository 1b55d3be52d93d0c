"""The name of a model in the swarm: the prefix of all its UIDs (``<prefix>.<block>``).

The rules for Llama, Falcon, BLOOM and Mixtral are Petals' own, so that our servers and theirs meet. The other
families never were in Petals; they follow the plain rule of its Falcon: the last part of the repository's name.
The account is dropped on purpose: copies of a model under several accounts are one swarm.
"""

from __future__ import annotations

import re
from pathlib import Path

from petalsd.errors import ConfigError

_WITH_ACCOUNT = ("bloom", "mixtral")
# Repositories that the first Petals read, converted from those of the same name without the suffix.
_CONVERTED_BLOOM = re.compile(r"^(bigscience/.*)-petals$")


def dht_prefix(model_type: str, source: str, is_directory: bool, explicit: str | None) -> str:
    """The explicit prefix if there is one, else derived from a repository's name or a directory's, by family.

    Raises ConfigError for a prefix that cannot be part of a UID.
    """
    if explicit is not None:
        return check_prefix(explicit)
    name = Path(source).resolve().name if is_directory else source.rstrip("/")
    if model_type not in _WITH_ACCOUNT:
        name = name.rpartition("/")[2]
    if model_type == "bloom":
        name = _CONVERTED_BLOOM.sub(r"\1", name) + "-petals"
    prefix = name.replace(".", "-")
    if model_type == "llama" and not prefix.endswith("-hf"):
        prefix += "-hf"
    return check_prefix(prefix)


def check_prefix(prefix: str) -> str:
    """UIDs are split at ``.`` and chained with spaces, so a prefix holds neither. Returns it, or ConfigError."""
    if not prefix or "." in prefix or any(character.isspace() for character in prefix):
        raise ConfigError(
            f"model.dht_prefix = {prefix!r}: it must not be empty nor hold a dot or white space",
            hint="set model.dht_prefix to the name that all servers of this model use",
        )
    return prefix
