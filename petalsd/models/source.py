"""Where a model comes from, a directory or a repository on the Hub: its config, and which file holds a tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from petalsd.errors import WeightsError
from petalsd.models.disk_budget import DiskBudget
from petalsd.models.files import DirectoryStore, FileStore, Progress, check_readable, looking_at
from petalsd.models.hub import HubStore
from petalsd.paths import instance_paths

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COPY_AGAIN = "it is damaged or incomplete: copy it here again; of a repository, delete it and start again"


class ModelSource:
    """A model by name: ``source`` is a directory if one of that name exists, else a repository on the Hub.

    cache_dir       where files from the Hub are kept; None: the cache that all daemons of this user share
    token           sent to the Hub with every request
    offline         only what earlier runs have fetched is used
    max_disk_bytes  what this model cache may take; None: whatever leaves a reserve on the disk
    budget          that of another source, which then says where files are kept and what they may take
    """

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        cache_dir: Path | None = None,
        token: str | None = None,
        offline: bool = False,
        max_disk_bytes: int | None = None,
        budget: DiskBudget | None = None,
    ) -> None:
        self.source = source
        with looking_at(Path(source).name):
            self.is_directory = Path(source).is_dir()
        self._index: dict[str, str] | None = None
        self._stored_names: dict[str, str] = {}
        self._files: FileStore
        if self.is_directory:
            self._files = DirectoryStore(Path(source))
        else:
            cache = cache_dir or instance_paths("client", os.environ).weights_dir
            budget = budget or DiskBudget(cache, max_disk_bytes)
            self._files = HubStore(source, revision, budget, token, offline)
        self._beside = partial(
            ModelSource,
            cache_dir=cache_dir, token=token, offline=offline, max_disk_bytes=max_disk_bytes, budget=budget,
        )  # fmt: skip

    def sibling(self, source: str) -> ModelSource:
        """Another source, by what this one was made with; of a repository the main revision."""
        return self._beside(source)

    @property
    def name(self) -> str:
        """What messages call it: the repository, or the last part of the directory's path."""
        return Path(self.source).resolve().name if self.is_directory else self.source

    def config(self) -> dict[str, Any]:
        """``config.json``, parsed; code that a repository brings is never run. Raises WeightsError."""
        return self.read_json(CONFIG_FILE)

    def has(self, file: str) -> bool:
        """Whether there is a file of this name. Raises WeightsError."""
        return file in self._files.list_files()

    def index(self) -> dict[str, str]:
        """Tensor name to file name, read once. Raises WeightsError, also for a model without safetensors.

        A text model in one of text and images has the names that it has alone: ``stored_name`` says the file's.
        """
        if self._index is None:
            index = self._read_index()
            self._stored_names = self._by_names_alone(index)
            self._index = {name: index[stored] for name, stored in self._stored_names.items()}
        return self._index

    def stored_name(self, name: str) -> str:
        """What a tensor of the index is called in its file."""
        return self._stored_names.get(name, name)

    def fetch(self, files: Iterable[str], progress: Progress | None = None) -> None:
        """Make these files available at ``path``, downloading what is missing. Raises WeightsError."""
        self._files.fetch(files, progress)

    def fetch_weights(self, file: str) -> Path:
        """Where a safetensors file of this name lies, fetched. WeightsError when there is none."""
        present = self._files.list_files()
        if file not in present:
            raise self._lacks(f"has no {file}", present)
        self.fetch([file])
        return self.path(file)

    def release_all_but(self, files: Iterable[str]) -> None:
        """Of the files with weights only these have to stay on this machine. Raises WeightsError."""
        self._files.release(set(self.index().values()) - set(files))

    def path(self, file: str) -> Path:
        """Where a fetched file lies on this machine."""
        return self._files.path(file)

    def check_files(self, files: Iterable[str]) -> None:
        """WeightsError for a safetensors file of a directory that is missing, damaged or lacks a tensor.

        Reads headers only. What the Hub has is checked against its digest when it comes.
        """
        if not self.is_directory:
            return
        self.fetch(files)
        for file in files:
            names = {name_alone(name) for name in _tensor_names(self.path(file))}
            lacking = sorted(
                name for name, where in self.index().items() if where == file and name not in names
            )
            if lacking:
                raise WeightsError(f"{file} lacks the tensor {lacking[0]}", hint=COPY_AGAIN)

    def _by_names_alone(self, index: Mapping[str, str]) -> dict[str, str]:
        by_name: dict[str, str] = {}
        for stored in index:
            first = by_name.setdefault(name := name_alone(stored), stored)
            if first != stored:
                raise WeightsError(
                    f"{self.name} has the tensor {name} twice, as {first} and as {stored}",
                    hint="leave one of them in its files: nobody can tell which is meant",
                )
        return by_name

    def _read_index(self) -> dict[str, str]:
        present = self._files.list_files()
        if INDEX_FILE in present:
            index = _parse_index(self.read_json(INDEX_FILE))
            # One that describes the shards of an earlier save may lie beside the single file that followed them.
            if SINGLE_FILE not in present or present.issuperset(index.values()):
                return index
        if SINGLE_FILE in present:
            self.fetch([SINGLE_FILE])
            return dict.fromkeys(_tensor_names(self.path(SINGLE_FILE)), SINGLE_FILE)
        raise self._lacks(f"has neither {INDEX_FILE} nor {SINGLE_FILE}", present)

    def _lacks(self, what: str, present: frozenset[str]) -> WeightsError:
        """Why there are no safetensors files."""
        if any(name.endswith((".bin", ".pt", ".pth")) for name in present):
            return WeightsError(
                f"{self.name} has weights in pickle files only, which can run code when read",
                hint="convert it: load it with the library that it is made for, transformers or peft, and call "
                "save_pretrained, which writes safetensors",
            )
        return WeightsError(f"{self.name} {what}")

    def read_json(self, file: str) -> dict[str, Any]:
        """A JSON object in a file, which is fetched. Raises WeightsError."""
        self.fetch([file])
        try:
            content = json.loads(self.path(file).read_bytes())
        except (OSError, ValueError) as error:
            raise WeightsError(f"{file} of {self.name} cannot be read: {error}") from error
        except RecursionError as error:
            raise WeightsError(f"{file} of {self.name} cannot be read: nested too deeply") from error
        if not isinstance(content, dict):
            raise WeightsError(f"{file} of {self.name} is not a JSON object")
        return content


def _parse_index(content: dict[str, Any]) -> dict[str, str]:
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{INDEX_FILE} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise WeightsError(
                f"{INDEX_FILE}: {name} lies in {file!r}, which is not the name of a safetensors file"
            )
    return weight_map


def name_alone(stored: str) -> str:
    """Without what stands around a text model: ``language_model.model.…`` or ``model.language_model.…``."""
    inner = stored.removeprefix("model.language_model.")
    return stored.removeprefix("language_model.") if inner == stored else f"model.{inner}"


def _tensor_names(path: Path) -> list[str]:
    check_readable(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path.name} has no valid safetensors header: {error}", hint=COPY_AGAIN
        ) from error
