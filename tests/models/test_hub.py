"""Weights from the Hub, against a server on loopback: what is fetched, resumed, verified, kept and refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from petalsd.errors import WeightsError
from petalsd.models import disk_budget
from petalsd.models.block_config import BlockConfig
from petalsd.models.disk_budget import DiskBudget
from petalsd.models.head_rule import HeadRule
from petalsd.models.head_weights import HeadTensors, load_head
from petalsd.models.source import INDEX_FILE, ModelSource
from petalsd.models.weights import block_tensors, files_with, load_block
from tests.models.fake_hub import COMMIT, FakeHub
from tests.numeric import assert_close
from tests.tiny_models import make_tiny

CPU = torch.device("cpu")


class StoppedError(Exception):
    """Raised by a progress callback."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_tiny("llama", path, max_shard_size="100KB")
    return path


def _source(cache: Path, **options: Any) -> ModelSource:
    return ModelSource(FakeHub.repository, cache_dir=cache, **options)


def _block_files(source: ModelSource, index: int) -> list[str]:
    return files_with(source, block_tensors(BlockConfig.from_hf(source.config()), index))


def test_a_block_fetches_only_the_shards_that_hold_it(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """Loading one block downloads config, index and its shards, no others, and gives the directory's block."""
    source = _source(tmp_path)
    config = BlockConfig.from_hf(source.config())
    block = load_block(source, config, 2, torch.float32, CPU)
    shards = _block_files(source, 2)
    assert hub.downloaded() == {"config.json", INDEX_FILE, *shards}
    assert len(shards) < len(list(checkpoint.glob("*.safetensors")))
    hidden = torch.ones(1, 3, config.hidden_size)
    expected = load_block(ModelSource(str(checkpoint)), config, 2, torch.float32, CPU).forward_dense(hidden)
    assert_close(block.forward_dense(hidden), expected, 0.0, 0.0, "block from the Hub")


def test_the_head_fetches_only_its_shards(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """A client downloads embeddings, norm and head, not the blocks."""
    source = _source(tmp_path)
    config = BlockConfig.from_hf(source.config())
    head = load_head(source, config, HeadRule(), torch.float32)
    tensors = HeadTensors.of(source, config, HeadRule())
    assert hub.downloaded() == {"config.json", INDEX_FILE, *files_with(source, tensors.shapes)}
    assert head.lm_head.shape == (config.vocab_size, config.hidden_size)


def test_nothing_is_fetched_twice(hub: FakeHub, tmp_path: Path) -> None:
    """A second start with the same cache downloads nothing."""
    first = _source(tmp_path)
    first.fetch(_block_files(first, 0))
    hub.downloads.clear()
    second = _source(tmp_path)
    second.fetch(_block_files(second, 0))
    assert hub.downloads == []


def test_a_cut_download_goes_on_where_it_stopped(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """When the connection breaks, the rest is asked for by range, and the whole is intact."""
    source = _source(tmp_path)
    shard = _block_files(source, 0)[0]
    hub.break_after[shard] = 1000
    source.fetch([shard])
    assert [start for file, start in hub.downloads if file == shard] == [0, 1000]
    assert source.path(shard).read_bytes() == (checkpoint / shard).read_bytes()


def test_a_restart_resumes_what_an_earlier_process_began(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    """A download that was stopped is continued by the next process with the same cache."""
    source = _source(tmp_path)
    shard = _block_files(source, 0)[0]
    hub.break_after[shard] = 1000

    def stop(file: str, done_bytes: int, total_bytes: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        source.fetch([shard], stop)
    hub.downloads.clear()
    _source(tmp_path).fetch([shard])
    assert hub.downloads == [(shard, 1000)]
    assert source.path(shard).read_bytes() == (checkpoint / shard).read_bytes()


def test_progress_is_told(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """The callback hears the file's name and its bytes, up to the whole."""
    source = _source(tmp_path)
    shard = _block_files(source, 0)[0]
    heard: list[tuple[str, int, int]] = []
    source.fetch([shard], lambda *report: heard.append(report))
    size = (checkpoint / shard).stat().st_size
    assert heard[-1] == (shard, size, size)


@pytest.mark.parametrize("damaged", ["config.json", "shard"])
def test_a_wrong_checksum_is_refused_and_not_kept(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, damaged: str
) -> None:
    """Content that does not have the Hub's digest is deleted; when it is right, it is fetched anew and used."""
    source = _source(tmp_path)
    shard = _block_files(ModelSource(str(checkpoint)), 0)[0] if damaged == "shard" else damaged
    hub.corrupt.add(shard)
    with pytest.raises(WeightsError, match=rf"{shard} of acme/tiny: .*digest"):
        source.fetch([shard])
    assert not [path for path in tmp_path.glob("*/blobs/*") if path.name.startswith(source.path(shard).name)]
    hub.corrupt.clear()
    source.fetch([shard])
    assert source.path(shard).read_bytes() == (checkpoint / shard).read_bytes()


def test_offline_uses_what_is_there_and_refuses_the_rest(hub: FakeHub, tmp_path: Path) -> None:
    """Offline, no request is made; a file that was fetched is read, another is refused by name."""
    online = _source(tmp_path)
    online.fetch(_block_files(online, 0))
    hub.tokens.clear()
    source = _source(tmp_path, offline=True)
    config = BlockConfig.from_hf(source.config())
    load_block(source, config, 0, torch.float32, CPU)
    with pytest.raises(WeightsError, match="never fetched"):
        load_block(source, config, 3, torch.float32, CPU)
    assert hub.tokens == []


def test_offline_without_a_cache_says_what_to_do(hub: FakeHub, tmp_path: Path) -> None:
    """A model that was never looked up cannot be served offline."""
    with pytest.raises(WeightsError, match=r"never fetched.*model\.offline = false"):
        _source(tmp_path, offline=True).config()
    assert hub.tokens == []


def test_an_unreachable_hub_does_not_stop_a_cached_model(hub: FakeHub, tmp_path: Path) -> None:
    """When the Hub is down, what it said the last time is used."""
    online = _source(tmp_path)
    online.fetch(_block_files(online, 0))
    hub.is_down = True
    again = _source(tmp_path)
    again.fetch(_block_files(again, 0))
    with pytest.raises(WeightsError, match="stopped at 0 of"):
        again.fetch(_block_files(again, 3))


def test_a_refused_connection_names_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache and without a Hub the error says what could not be looked up."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"acme/tiny.*cannot be reached"):
        _source(tmp_path).config()


def test_the_token_goes_with_every_request(hub: FakeHub, tmp_path: Path) -> None:
    """A gated model is read with the token, which is sent for the lookup and for each file."""
    hub.requires = "hf_secret"
    source = _source(tmp_path, token="hf_secret")
    source.fetch(_block_files(source, 0))
    assert set(hub.tokens) == {"Bearer hf_secret"}


def test_a_missing_token_is_told_without_the_token(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the Hub, the error names status and key; the user's own token is never sent unasked."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    hub.requires = "hf_secret"
    with pytest.raises(WeightsError, match=r"401.*model\.token_file") as caught:
        _source(tmp_path).config()
    with pytest.raises(WeightsError, match="401") as wrong:
        _source(tmp_path, token="hf_wrong").config()
    assert set(hub.tokens) == {None, "Bearer hf_wrong"}
    assert "hf_" not in str(caught.value) + str(wrong.value)


def test_an_unknown_revision_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    """The error names repository, revision and status."""
    with pytest.raises(WeightsError, match="acme/tiny at v9: the Hub answers with status 404"):
        _source(tmp_path, revision="v9").config()


def test_nonsense_is_not_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    """A source that is no directory and cannot be a repository is refused without a request."""
    with pytest.raises(
        WeightsError, match=r"^weights_error: '/no/such/directory' is neither a directory here nor"
    ):
        ModelSource("/no/such/directory", cache_dir=tmp_path).config()
    assert hub.tokens == []


def test_the_budget_evicts_what_was_used_longest_ago(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """When a new shard does not fit, the least recently used one goes, never one of the running model's."""
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    sizes = {name: (checkpoint / name).stat().st_size for name in shards}
    earlier = _source(tmp_path)
    earlier.fetch(shards[:3])
    for age, name in enumerate([shards[1], shards[0], shards[2]]):
        os.utime(earlier.path(name), (age, age))
    room = sum(sizes[name] for name in shards[:3])
    source = _source(tmp_path, max_disk_bytes=room)
    source.fetch([shards[0], shards[3]])
    assert source.path(shards[0]).exists()
    assert source.path(shards[3]).exists()
    assert source.path(shards[2]).exists()
    assert not source.path(shards[1]).exists()


def test_what_is_released_makes_room(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """A server that goes round the model keeps no more than the budget on the disk, and no move is too large."""
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    sizes = {name: (checkpoint / name).stat().st_size for name in shards}
    room = max(sizes.values()) + 20_000
    source = _source(tmp_path, max_disk_bytes=room)
    for name in shards:
        source.release_all_but([name])
        source.fetch([name])
        here = [other for other in shards if source.path(other).exists()]
        assert name in here and sum(sizes[other] for other in here) <= room


def test_siblings_delete_nothing_of_each_other(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    """An adapter that does not fit beside the model is an error, and the model is still there."""
    first, second = sorted(path.name for path in checkpoint.glob("*.safetensors"))[:2]
    source = _source(tmp_path, max_disk_bytes=(checkpoint / first).stat().st_size + 20_000)
    source.fetch([first])
    with pytest.raises(WeightsError, match="do not fit"):
        source.sibling(FakeHub.repository).fetch([second])
    assert source.path(first).exists()


def test_weights_that_cannot_fit_are_refused_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    """A budget smaller than a file is an error that says what to change, and nothing is downloaded."""
    source = _source(tmp_path, max_disk_bytes=30_000)
    shard = _block_files(source, 0)[0]
    hub.downloads.clear()
    with pytest.raises(WeightsError, match=r"do not fit.*model\.max_disk_bytes"):
        source.fetch([shard])
    assert hub.downloads == []


def test_a_full_disk_is_refused_before_the_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a budget, a reserve of the disk stays free."""
    source = _source(tmp_path)
    shard = _block_files(source, 0)[0]
    usage = type("Usage", (), {"free": (1 << 30) + 100})
    monkeypatch.setattr("petalsd.models.disk_budget.shutil.disk_usage", lambda path: usage)
    with pytest.raises(WeightsError, match="do not fit"):
        source.fetch([shard])


def test_a_cache_that_cannot_be_written_serves_what_it_holds(hub: FakeHub, tmp_path: Path) -> None:
    """On a full disk, or a read-only one, a model that is here starts; what is missing is told as such."""
    first = _source(tmp_path)
    first.fetch(_block_files(first, 0))
    for unwritable in (tmp_path / "acme--tiny" / "main.new", tmp_path / ".lock"):
        unwritable.unlink(missing_ok=True)
        unwritable.mkdir()
    second = _source(tmp_path)
    second.fetch(_block_files(second, 0))
    with pytest.raises(WeightsError, match=r"of acme/tiny cannot be stored: Is a directory \(make room"):
        second.fetch(_block_files(second, 3))


def test_two_sources_with_one_cache_download_once(hub: FakeHub, tmp_path: Path) -> None:
    """What another process brought while we waited for the cache is used."""
    ours, theirs = _source(tmp_path), _source(tmp_path)
    shard = _block_files(ours, 0)[0]
    theirs.fetch([shard])
    hub.downloads.clear()
    ours.fetch([shard])
    assert hub.downloads == []


def test_a_cache_that_another_process_holds_is_waited_for(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads into one cache go one at a time, and the wait for the other has a deadline."""
    source = _source(tmp_path)
    shard = _block_files(source, 0)[0]
    other = DiskBudget(tmp_path, None)
    with other.lock():
        monkeypatch.setattr(disk_budget, "_LOCK_DEADLINE_S", 0.0)
        with pytest.raises(WeightsError, match="another process"):
            source.fetch([shard])
    source.fetch([shard])
    assert source.path(shard).exists()


def test_a_name_that_is_no_digest_is_not_used_as_a_file_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest or a file name from the Hub that would lead out of the cache is ignored."""
    described = hub.describe()
    described["siblings"] = [
        {"rfilename": "config.json", "size": 1, "blobId": "../../../../etc/passwd"},
        {"rfilename": "../model.safetensors", "size": 1, "blobId": "0" * 40},
    ]
    monkeypatch.setattr(hub, "describe", lambda: described)
    with pytest.raises(WeightsError, match=r"has no file config\.json"):
        _source(tmp_path).config()


def test_the_commit_is_pinned(hub: FakeHub, tmp_path: Path) -> None:
    """Files are asked for at the commit that the lookup gave, so a push in between cannot mix revisions."""
    source = _source(tmp_path)
    source.config()
    assert COMMIT in (tmp_path / "acme--tiny" / "main.json").read_text()


def test_without_a_cache_directory_the_users_cache_is_used(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that names no cache shares the one of the user's daemons."""
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ModelSource(FakeHub.repository).config()
    assert list(tmp_path.glob("petalsd/weights/acme--tiny/main.json"))
