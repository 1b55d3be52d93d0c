"""A model on the Hub as a store of files: what it has, at which commit, and bringing here what is asked for.

Cache layout: ``<cache_dir>/<org>--<name>/<revision>.json`` says which files the revision has (its manifest), and
``blobs/<digest>`` holds each file by its content, so a new commit fetches only what it changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import structlog
from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from petalsd import __version__
from petalsd.errors import WeightsError
from petalsd.models.disk_budget import DiskBudget
from petalsd.models.files import Progress
from petalsd.models.hub_download import HTTP_ERROR, download, hint_for_status, is_passing

log = structlog.get_logger(__name__)

_API_TIMEOUT_S = 20.0
_NONSENSE = (ValueError, TypeError, LookupError, AttributeError)
"""What the library raises for an answer that is not the Hub's, as where a network wants a password first."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """``digest``: sha256 of a large file, git's blob id (sha1) of a small one."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a revision was when it was last looked up."""

    commit: str
    files: dict[str, HubFile]


class HubStore:
    """``files.FileStore`` over one revision of a repository. Blocking; used by one thread at a time.

    Files lie under the root of ``budget``. The endpoint is ``HF_ENDPOINT`` from the environment, else the public
    Hub.
    """

    def __init__(
        self,
        repository: str,
        revision: str | None,
        budget: DiskBudget,
        token: str | None,
        offline: bool,
    ) -> None:
        self._repository = repository
        self._revision = revision or constants.DEFAULT_REVISION
        self._folder = budget.root / repository.replace("/", "--")
        # False, not None: without a token of its own the library would look for the user's.
        self._token: str | bool = token or False
        self._offline = offline
        self._budget = budget
        self._manifest: Manifest | None = None

    def list_files(self) -> frozenset[str]:
        return frozenset(self._get_manifest().files)

    def path(self, file: str) -> Path:
        entry = self._get_manifest().files.get(file)
        if entry is None:
            raise WeightsError(f"{self._repository} has no file {file}")
        return self._folder / "blobs" / entry.digest

    def fetch(self, files: Iterable[str], progress: Progress | None) -> None:
        """Present files are taken by their size: their digest was checked when they came."""
        paths = {file: self.path(file) for file in files}
        self._budget.hold(paths.values())
        missing = [file for file in paths if not self._is_here(file)]
        for file in paths.keys() - set(missing):
            self._budget.touch(paths[file])
        if missing and self._offline:
            raise WeightsError(
                f"{', '.join(missing)} of {self._repository} were never fetched, and model.offline is set",
                hint="start once with model.offline = false",
            )
        for file in missing:
            try:
                with self._budget.lock():
                    if not self._is_here(file):  # another process may have brought it
                        self._download(file, progress)
            except OSError as error:
                raise WeightsError(
                    f"{file} of {self._repository} cannot be stored: {error.strerror or error}",
                    hint="make room there, let this user write, or set model.cache_dir",
                ) from error

    def release(self, files: Iterable[str]) -> None:
        self._budget.release(self.path(file) for file in files)

    def _is_here(self, file: str) -> bool:
        path = self.path(file)
        return path.is_file() and path.stat().st_size == self._get_manifest().files[file].size

    def _download(self, file: str, progress: Progress | None) -> None:
        manifest, target = self._get_manifest(), self.path(file)
        size = manifest.files[file].size
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        have = part.stat().st_size if part.exists() else 0
        self._budget.make_room(max(size - have, 0), part)

        def report(num_bytes: int) -> None:
            if progress is not None:
                progress(file, num_bytes, size)

        log.info("download_started", file=file, size_bytes=size, resumed_at_bytes=have)
        url = hf_hub_url(self._repository, file, revision=manifest.commit, endpoint=_endpoint())
        try:
            download(url, self._headers(), target, size, report)
        except WeightsError as error:
            raise WeightsError(f"{file} of {self._repository}: {error.message}", hint=error.hint) from error

    def _headers(self) -> dict[str, str]:
        agent = {"User-Agent": f"petalsd/{__version__}"}
        return {**agent, "Authorization": f"Bearer {self._token}"} if self._token else agent

    def _get_manifest(self) -> Manifest:
        if self._manifest is None:
            stored = self._folder / f"{self._revision.replace('/', '--')}.json"
            self._manifest = self._load(stored) if self._offline else self._look_up(stored)
        return self._manifest

    def _look_up(self, stored: Path) -> Manifest:
        """Ask the Hub; if it cannot be reached, what it said the last time will do."""
        api = HfApi(endpoint=_endpoint(), token=self._token)
        try:
            info = api.model_info(
                self._repository, revision=self._revision, files_metadata=True, timeout=_API_TIMEOUT_S
            )
            manifest = _to_manifest(info)
        except HFValidationError as error:
            raise WeightsError(
                f"{self._repository!r} is neither a directory here nor the name of a repository"
            ) from error
        except (HTTP_ERROR, OfflineModeIsEnabled, *_NONSENSE) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if is_passing(status) and stored.is_file():
                log.warning("hub_unreachable", repository=self._repository, error=type(error).__name__)
                return self._load(stored)
            raise self._lookup_failure(error, status) from error
        try:
            _store(manifest, stored)
        except OSError as error:  # everything else may be here, as on a disk that has become full
            log.warning("manifest_not_stored", repository=self._repository, error=str(error))
        return manifest

    def _lookup_failure(self, error: Exception, status: int | None) -> WeightsError:
        name, at_revision = self._repository, f"{self._repository} at {self._revision}"
        if isinstance(error, _NONSENSE):
            return WeightsError(
                f"{at_revision}: the answer of the Hub makes no sense", hint="suspect a proxy, or HF_ENDPOINT"
            )
        if status is None:
            return WeightsError(
                f"{name} is not a directory here, and the Hub cannot be reached to look it up",
                hint="check the network, or set model.source to a directory that holds the model",
            )
        return WeightsError(
            f"{at_revision}: the Hub answers with status {status}", hint=hint_for_status(status)
        )

    def _load(self, stored: Path) -> Manifest:
        try:
            content: dict[str, Any] = json.loads(stored.read_bytes())
            files = {
                name: HubFile(entry["size"], entry["digest"]) for name, entry in content["files"].items()
            }
            return Manifest(content["commit"], files)
        except FileNotFoundError as error:
            raise WeightsError(
                f"{self._repository} at {self._revision} was never fetched, and model.offline is set",
                hint="start once with model.offline = false",
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"the manifest {stored.name} of {self._repository} is damaged: delete it"
            ) from error


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _store(manifest: Manifest, stored: Path) -> None:
    stored.parent.mkdir(parents=True, exist_ok=True)
    fresh = stored.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(manifest), indent=1))
    fresh.replace(stored)


def _to_manifest(info: ModelInfo) -> Manifest:
    """Files at the top of the repository; those in folders are other formats of the same weights."""
    files: dict[str, HubFile] = {}
    for sibling in info.siblings or []:
        digest = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        if "/" not in sibling.rfilename and _is_size(sibling.size) and _is_digest(digest):
            files[sibling.rfilename] = HubFile(sibling.size, digest)
    return Manifest(info.sha or "", files)


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and value >= 0


def _is_digest(text: str | None) -> TypeGuard[str]:
    """It becomes a file name, so it is checked like anything that came over the network."""
    return text is not None and len(text) in (40, 64) and set(text) <= set("0123456789abcdef")
