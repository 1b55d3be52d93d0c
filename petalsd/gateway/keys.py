"""Who may ask: everybody who reaches the address, or those who show one of the keys in a file."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

from petalsd.errors import ConfigError

_MIN_CHARS = 8


class Keys:
    """No keys: everybody may."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._keys = [key.encode() for key in keys]

    @classmethod
    def read(cls, file: Path) -> Keys:
        """One on each line, without blank lines and those that begin with #. ConfigError names what is wrong."""
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            text = f"--api-keys {file}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
            raise ConfigError(text, hint="name a text file with one key on each line") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys or min(map(len, keys)) < _MIN_CHARS:
            text = f"--api-keys {file}: a key of {_MIN_CHARS} characters or more is needed on each line"
            raise ConfigError(text, hint="openssl rand -hex 24")
        return cls(keys)

    @property
    def are_needed(self) -> bool:
        return bool(self._keys)

    def admit(self, authorization: str | None) -> bool:
        """``Bearer KEY``. How long it takes says nothing of a key."""
        if not self._keys:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = key.strip().encode(errors="replace")
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)
