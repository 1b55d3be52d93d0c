"""Who may ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from petalsd.errors import ConfigError
from petalsd.gateway.keys import Keys


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the office\nfirst-key-1\n\n  second-key \n")
    keys = Keys.read(file)
    assert keys.are_needed
    assert keys.admit("Bearer first-key-1") and keys.admit("bearer  second-key")
    wrong = (
        None,
        "",
        "first-key-1",
        "Bearer",
        "Bearer first-key",
        "Basic first-key-1",
        "Bearer # of the office",
    )
    assert not any(map(keys.admit, (*wrong, "Bearer \udcff")))


def test_without_keys_everybody_may() -> None:
    assert Keys().admit(None) and not Keys().are_needed


@pytest.mark.parametrize("content", [None, b"", b"# none\n", b"short\n", b"\xff\xfe\n"])
def test_a_file_that_holds_none(content: bytes | None, tmp_path: Path) -> None:
    """It is refused: a gateway that was to be closed would be open."""
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--api-keys .*/keys: "):
        Keys.read(file)
