"""The configuration in force, and how a reload changes it: completely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from petalsd.config import Config
from petalsd.config_loading import changed_keys, with_live_keys
from petalsd.log import set_level


@dataclass(frozen=True, slots=True)
class Reload:
    """What a reload came to: ``applied`` keys changed; ``pending`` ones did in the file and need a restart."""

    applied: tuple[str, ...]
    pending: tuple[str, ...]


class Settings:
    """``read`` loads the configuration again; ``check`` raises ConfigError when this machine cannot follow it."""

    def __init__(self, config: Config, read: Callable[[], Config], check: Callable[[Config], object]) -> None:
        self.config = config
        self._read = read
        self._check = check

    def reload(self) -> Reload:
        """Apply what can be applied while running; ConfigError when the new one is bad: nothing has changed."""
        new = self._read()
        merged = with_live_keys(self.config, new)
        self._check(merged)
        applied, pending = changed_keys(self.config, new)
        self.config = merged
        set_level(merged.daemon.log_level)
        return Reload(tuple(applied), tuple(pending))
