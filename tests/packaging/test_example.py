"""The commented configuration that an administrator starts from."""

from __future__ import annotations

import re
from pathlib import Path

from petalsd.config_loading import DEFAULT_ORIGIN, known_keys, load_config, value_of
from tests.packaging.commands import PACKAGING

EXAMPLE = PACKAGING / "petalsd.toml"


def test_it_can_be_used_as_it_is() -> None:
    """It names a model, and leaves every other key at its default."""
    loaded = load_config(EXAMPLE, {}, [])
    assert [key for key, origin in loaded.origins.items() if origin != DEFAULT_ORIGIN] == ["model.source"]


def test_every_commented_line_is_valid(tmp_path: Path) -> None:
    """With all comments taken away it still loads, has every key, and shows the defaults as they are."""
    file = tmp_path / "demo.toml"
    file.write_text(re.sub(r"^#(?=\w+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE))
    loaded = load_config(file, {}, [])
    assert [key for key, origin in loaded.origins.items() if origin == DEFAULT_ORIGIN] == []
    for key, field in known_keys().items():
        if not field.is_required() and field.default is not None:
            assert value_of(loaded.config, key) == field.default, key
