"""The arguments that name a configuration, shared by run, check and show."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from petalsd.config_loading import LoadedConfig, load_config
from petalsd.errors import ConfigError
from petalsd.paths import InstancePaths, config_file_of, instance_paths, is_instance_name, is_there


@dataclass(frozen=True, slots=True)
class ConfigChoice:
    """Which files a command works with; ``load`` reads them again each time (reload).

    An instance may do without its file, configured by the environment or the command line (containers); a file
    that was named must be there.
    """

    file: Path
    is_file_optional: bool
    paths: InstancePaths
    overrides: tuple[str, ...]

    def load(self) -> LoadedConfig:
        has_file = is_there(self.file) or not self.is_file_optional
        try:
            return load_config(self.file if has_file else None, os.environ, self.overrides)
        except ConfigError as error:
            if has_file:
                raise
            raise ConfigError(error.message, hint=f"there is no {self.file}") from error


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-c", "--config", type=Path, metavar="FILE", help="configuration file (TOML)")
    which.add_argument(
        "-i",
        "--instance",
        metavar="NAME",
        help="instance: /etc/petalsd/NAME.toml, else ~/.config/petalsd/NAME.toml",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated",
    )


def config_choice(arguments: argparse.Namespace) -> ConfigChoice:
    """An instance that is started from a file is called as the file is."""
    is_instance = arguments.instance is not None
    file = config_file_of(arguments.instance, os.environ) if is_instance else arguments.config
    instance = arguments.instance if is_instance else _instance_of(file)
    return ConfigChoice(file, is_instance, instance_paths(instance, os.environ), tuple(arguments.set))


def _instance_of(file: Path) -> str:
    """ConfigError when the file's name cannot name one."""
    if not file.name:  # of "" and ".": somebody's variable is not set
        raise ConfigError(
            f"--config: {str(file)!r} is no file", hint="name a file as in /etc/petalsd/NAME.toml"
        )
    if not is_instance_name(file.stem):
        fitting = file.with_name(
            (re.sub(r"[^A-Za-z0-9_.]+", "-", file.stem).strip("-.") or "petalsd") + ".toml"
        )
        raise ConfigError(
            f"{file}: the instance is called as the file, {file.stem!r}: use letters, digits, '_', '-' and '.'",
            hint=shlex.join(["mv", "--", str(file), str(fitting)]),
        )
    return file.stem
