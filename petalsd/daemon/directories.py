"""The directories that an instance writes to."""

from __future__ import annotations

from petalsd.errors import ConfigError
from petalsd.paths import InstancePaths


def make_directories(paths: InstancePaths) -> None:
    """Outside systemd nobody else makes them; the state is for our eyes only."""
    try:
        paths.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths.cache_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be made: {error.strerror}",
            hint="set STATE_DIRECTORY and CACHE_DIRECTORY to directories of this user",
        ) from error
