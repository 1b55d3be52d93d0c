"""What a model source needs from the place where its files are, and the simplest such place, a directory."""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from petalsd.errors import WeightsError

Progress = Callable[[str, int, int], None]
"""Called as a file arrives: its name, bytes so far, bytes in all. It may raise to stop the download."""


class FileStore(Protocol):
    """The files of one model: how to know them, get them, and find them on this machine."""

    def list_files(self) -> frozenset[str]:
        """Names of the files that the model has; raises WeightsError when it cannot be found."""

    def fetch(self, files: Iterable[str], progress: Progress | None) -> None:
        """Bring these files here, whole and verified; at once when they are. Raises WeightsError."""

    def path(self, file: str) -> Path:
        """Where a fetched file lies."""

    def release(self, files: Iterable[str]) -> None:
        """These files need not stay here: a store that brought them may delete them for others."""


def check_readable(path: Path) -> None:
    """WeightsError for a file that this user may not read: the safetensors library calls it missing."""
    with looking_at(path.name):
        is_closed = path.exists() and not os.access(path, os.R_OK)
    if is_closed:
        raise _unreadable(path.name)


@contextlib.contextmanager
def looking_at(name: str) -> Iterator[None]:
    """WeightsError, called by this name, where this user may not look."""
    try:
        yield
    except PermissionError as error:
        raise _unreadable(name) from error


def _unreadable(name: str) -> WeightsError:
    return WeightsError(
        f"{name} may not be read by the user {getpass.getuser()}",
        hint="let it, for instance with chmod a+r on the files and a+x on the directories above",
    )


class DirectoryStore:
    """A directory with config.json and safetensors files in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def list_files(self) -> frozenset[str]:
        with looking_at(self._directory.name):
            return frozenset(entry.name for entry in self._directory.iterdir() if entry.is_file())

    def fetch(self, files: Iterable[str], progress: Progress | None) -> None:
        for file in files:
            with looking_at(self._directory.name):
                is_here = self.path(file).is_file()
            if not is_here:
                raise WeightsError(
                    f"{file} is missing in {self._directory.name}", hint="copy the whole checkpoint"
                )

    def path(self, file: str) -> Path:
        return self._directory / file

    def release(self, files: Iterable[str]) -> None:
        """They stay: the directory is the user's."""
