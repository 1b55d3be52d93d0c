"""How much memory the prefix cache may take."""

from __future__ import annotations

import pytest

from petalsd.config import EngineSection
from petalsd.daemon import prefix_room
from petalsd.daemon.prefix_room import auto_prefix_bytes, prefix_cache_bytes
from petalsd.errors import ConfigError

GIB = 1 << 30


@pytest.mark.parametrize(("available", "expected"), [(32 * GIB, GIB), (1024 * GIB, 4 * GIB), (0, 0)])
def test_a_thirty_second_of_the_memory_and_four_gib_at_most(available: int, expected: int) -> None:
    assert auto_prefix_bytes(available) == expected


def test_what_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_room, "device_memory_bytes", lambda device: 8 * GIB)
    sizes = {"auto": GIB // 4, "0": 0, "8GiB": 8 * GIB}
    for text, expected in sizes.items():
        assert prefix_cache_bytes(EngineSection.model_validate({"prefix_cache_bytes": text})) == expected
    with pytest.raises(ConfigError, match=r"prefix_cache_bytes = 9663676416: 8589934592 bytes .* \(lower it"):
        prefix_cache_bytes(EngineSection.model_validate({"prefix_cache_bytes": "9GiB"}))
