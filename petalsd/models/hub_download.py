"""One file from the Hub: fetched in pieces that survive a restart, and kept only if its digest is right."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog
from huggingface_hub import get_session, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError

from petalsd.errors import WeightsError

log = structlog.get_logger(__name__)

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Root of what the HTTP client raises: huggingface_hub changes its client between versions, not this relation."""

_MAX_FRUITLESS_TRIES = 5
_READ_TIMEOUT_S = 30.0
_PIECE_BYTES = 1 << 20
_SUSPECT = "they were deleted; try again, and suspect a proxy or the disk if it happens again"


def download(
    url: str, headers: Mapping[str, str], target: Path, size: int, on_bytes: Callable[[int], None]
) -> None:
    """Bring ``url`` to ``target``, which appears only when all ``size`` bytes are there and its name fits them.

    ``target.name`` is the expected digest: sha256, or the sha1 that git gives to a small file. What arrived is
    kept in ``target.part``, and this call or a later one goes on from there. ``on_bytes`` gets the bytes so far;
    it may raise to stop. Raises WeightsError when the server refuses, nothing more arrives, more than the file
    arrives, or the digest is wrong.
    """
    part = target.with_name(target.name + ".part")
    fruitless = 0
    while (have := _size(part)) != size:
        if have > size:
            part.unlink()
            continue
        try:
            _fetch_rest(url, headers, part, size, on_bytes)
        except HTTP_ERROR as error:
            _refuse_permanent(error)
            log.warning(
                "download_interrupted", have_bytes=_size(part), size_bytes=size, error=type(error).__name__
            )
        fruitless = 0 if _size(part) > have else fruitless + 1
        if fruitless >= _MAX_FRUITLESS_TRIES:
            raise WeightsError(
                f"the download stopped at {_size(part)} of {size} bytes",
                hint="it goes on from there at the next try; check the network",
            )
        if fruitless:
            time.sleep(0.1 * 2**fruitless)
    _keep_if_intact(part, target, size)


def _fetch_rest(
    url: str, headers: Mapping[str, str], part: Path, size: int, on_bytes: Callable[[int], None]
) -> None:
    """Append what is missing. WeightsError, and nothing is kept, when the server sends more than ``size``."""
    have = _size(part)
    # Compressed transfer would make byte ranges mean something else.
    request = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with get_session().stream("GET", url, headers=request, timeout=_READ_TIMEOUT_S) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)
            return
        hf_raise_for_status(response)
        is_rest = response.status_code == 206
        have = have if is_rest else 0
        with part.open("ab" if is_rest else "wb") as file:
            for piece in response.iter_raw():
                file.write(piece)
                have += len(piece)
                on_bytes(min(have, size))
                if have > size:
                    break
    if have > size:
        part.unlink()
        raise WeightsError(f"more than the {size} bytes arrive that the Hub gives for it", hint=_SUSPECT)


def _refuse_permanent(error: Exception) -> None:
    """Raise WeightsError for an answer that asking again will not change."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is not None and status >= 400 and not is_passing(status):
        raise WeightsError(f"the Hub answers with status {status}", hint=hint_for_status(status)) from error


def is_passing(status: int | None) -> bool:
    """Whether an answer of this status, or none at all, says nothing of what was asked for."""
    return status is None or status >= 500 or status in (408, 429)


def hint_for_status(status: int | None) -> str:
    """What to do about an answer of the Hub."""
    if status in (401, 403):
        return "set model.token_file to a token of an account that was granted access to the model"
    if status == 404:
        return "check model.source and model.revision; a private model needs model.token_file"
    return "try again later"


def _keep_if_intact(part: Path, target: Path, size: int) -> None:
    if size == 0:
        part.touch()
    if _digest(part, size, is_git=len(target.name) == 40) != target.name:
        part.unlink()
        raise WeightsError(
            f"the downloaded {size} bytes do not have the digest {target.name[:12]} that the Hub gives for them",
            hint=_SUSPECT,
        )
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)


def _digest(path: Path, size: int, *, is_git: bool) -> str:
    """sha256, or git's blob id: sha1 over a header with the size and the content."""
    with path.open("rb") as file:
        if not is_git:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
        return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
