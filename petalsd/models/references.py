"""What transformers' layers make of the tokens of a trial, kept from one start to the next.

To make it takes transformers' code of the family, which brings the compiler of torch along, and one block in
float32. What is kept is compared with as if it had just been made: every start tries its kernels, on this machine
and with the weights that it serves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import structlog
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from petalsd import __version__
from petalsd.models.architecture import Architecture
from petalsd.models.source import ModelSource
from petalsd.models.trial import Reference, Tokens
from petalsd.models.weight_storage import WeightStorage
from petalsd.models.weights import files_with

log = structlog.get_logger(__name__)

MAX_KEPT = 64
"""Files, of a few MB at most: one for each kind of blocks that a model has, and each dtype and format."""


def reference_key(
    architecture: Architecture, source: ModelSource, storage: WeightStorage, index: int, tokens: Tokens
) -> str:
    """A name for all that a reference follows from. Raises WeightsError.

    Files are told apart by what the file system says of them. Where that misleads, the block's own output does not
    agree, and the reference is made anew.
    """
    device = storage.device
    facts = {
        "versions": [__version__, transformers.__version__, torch.__version__],
        "config": architecture.layers.hf.to_dict(),
        "block": index,
        "files": [_identity(source.path(file)) for file in _files(architecture, source, index)],
        "form": [str(storage.dtype), storage.format and storage.format.name],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "tokens": hashlib.sha256(torch.cat(tokens.rows).cpu().numpy().tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class ReferenceStore:
    """A directory with a file for each reference; without one nothing is kept.

    A damaged file counts as none, and one that cannot be written is done without.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def get(self, key: str, tokens: Tokens) -> Reference | None:
        """The reference of that key, to the device of ``tokens``, from which it was made."""
        if self._directory is None:
            return None
        file = self._file(key)
        try:
            with safe_open(file, "pt") as opened:
                reference = _restored(opened.get_tensor("expected"), opened.metadata() or {}, tokens)
            os.utime(file)
            return reference
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            log.warning("reference_unreadable", file=str(file), error=repr(error))
            return None

    def put(self, key: str, reference: Reference) -> None:
        """Keep it, and of all the ``MAX_KEPT`` that were used last."""
        if self._directory is None:
            return
        file = self._file(key)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        metadata = {"tolerance": repr(reference.tolerance), "is_sparse": json.dumps(reference.is_sparse)}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            save_file({"expected": reference.expected.cpu().contiguous()}, partial, metadata)
            partial.replace(file)
            self._drop_oldest()
        except (OSError, SafetensorError) as error:
            log.warning("reference_not_kept", file=str(file), error=repr(error))

    def _file(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{key}.safetensors"

    def _drop_oldest(self) -> None:
        """Also what a process left that died while it wrote."""
        assert self._directory is not None
        entries = sorted(self._directory.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in entries[MAX_KEPT:]:
            entry.unlink(missing_ok=True)


def _restored(expected: torch.Tensor, metadata: dict[str, str], tokens: Tokens) -> Reference:
    """ValueError or KeyError unless it is a reference for these tokens."""
    entering = torch.cat(tokens.rows)
    tolerance, is_sparse = float(metadata["tolerance"]), json.loads(metadata["is_sparse"])
    is_right = expected.shape == entering.shape and expected.dtype == torch.float32
    if not (is_right and isinstance(is_sparse, bool) and math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"{tuple(expected.shape)} {expected.dtype}, {metadata}")
    return Reference(entering, expected.to(entering.device), is_sparse, tolerance)


def _files(architecture: Architecture, source: ModelSource, index: int) -> list[str]:
    return files_with(source, architecture.tensor_names(index, source))


def _identity(file: Path) -> list[Any]:
    path = file.resolve()
    try:
        status = path.stat()
    except OSError:  # whoever reads it says what is wrong
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]
