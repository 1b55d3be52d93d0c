"""Answers of the Hub, or of what stands between, that are not what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalsd.errors import WeightsError
from petalsd.models.source import ModelSource
from tests.models.fake_hub import FakeHub
from tests.tiny_models import make_tiny

PORTAL = b"<html>Please log in</html>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_tiny("llama", path)
    return path


def _source(cache: Path) -> ModelSource:
    return ModelSource(FakeHub.repository, cache_dir=cache)


def test_more_bytes_than_the_file_has_end_the_download(hub: FakeHub, tmp_path: Path) -> None:
    """A page to log in, instead of a small file, would be asked for without end; nothing of it is kept."""
    hub.padded.add("config.json")
    with pytest.raises(WeightsError, match=r"config\.json of acme/tiny: .*more than .* bytes.*proxy"):
        _source(tmp_path).config()
    assert hub.downloads == [("config.json", 0)]
    hub.padded.clear()
    assert _source(tmp_path).config()["model_type"] == "llama"


def test_a_range_that_is_refused_at_the_start_is_not_a_fault_of_the_disk(
    hub: FakeHub, tmp_path: Path
) -> None:
    """416 to a request without a range: there is nothing to begin anew with."""
    hub.refused["config.json"] = 416
    with pytest.raises(WeightsError, match="stopped at 0 of"):
        _source(tmp_path).config()


@pytest.mark.parametrize("status", [408, 429])
def test_a_hub_without_time_does_not_stop_a_cached_model(hub: FakeHub, status: int, tmp_path: Path) -> None:
    """Too many requests, from this address or anybody behind it, say nothing about the model."""
    _source(tmp_path).config()
    hub.lookup = (status, b"later")
    assert _source(tmp_path).config()["model_type"] == "llama"
    with pytest.raises(WeightsError, match=rf"status {status}.*try again later"):
        _source(tmp_path / "empty").config()


@pytest.mark.parametrize("body", [PORTAL, b"", b"[]", b"{}", b'{"id": "acme/tiny", "siblings": [3]}'])
def test_a_lookup_that_is_answered_with_nonsense(hub: FakeHub, body: bytes, tmp_path: Path) -> None:
    """As where a network wants a password first: like a Hub that is not there."""
    _source(tmp_path).config()
    hub.lookup = (200, body)
    assert _source(tmp_path).config()["model_type"] == "llama"
    with pytest.raises(WeightsError, match=r"acme/tiny at main: the answer .* proxy"):
        _source(tmp_path / "empty").config()


@pytest.mark.parametrize("size", ["724", -1, None])
def test_a_size_that_is_none_is_not_asked_for(
    hub: FakeHub, size: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = hub.describe()
    for sibling in described["siblings"]:
        sibling["size"] = size
    monkeypatch.setattr(hub, "describe", lambda: described)
    with pytest.raises(WeightsError, match=r"acme/tiny has no file config\.json"):
        _source(tmp_path).config()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_model_that_was_taken_back_is_refused(hub: FakeHub, status: int, tmp_path: Path) -> None:
    """Also where it is in the cache: what the Hub says of the model, it means."""
    _source(tmp_path).config()
    hub.lookup = (status, b"no")
    with pytest.raises(WeightsError, match=f"status {status}"):
        _source(tmp_path).config()
