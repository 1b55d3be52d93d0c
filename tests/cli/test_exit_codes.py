"""Exit statuses by error: what a restart can heal and what it cannot."""

from __future__ import annotations

import pytest

from petalsd.cli.exit_codes import exit_code_of
from petalsd.errors import (
    AddressUnavailable,
    ConfigError,
    DeadlineExceeded,
    DeviceLost,
    EngineError,
    ModelError,
    PetalsdError,
    SwarmError,
    UnsupportedModel,
    WeightsError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 78), (ModelError("x"), 78), (UnsupportedModel("x"), 78),
        (WeightsError("x"), 75), (SwarmError("x"), 75), (DeadlineExceeded("x"), 75),
        (AddressUnavailable("x"), 75),
        (DeviceLost("cudaErrorUnknown", 999, "unknown error"), 74),
        (EngineError("x"), 1), (PetalsdError("x"), 1),
    ],
)  # fmt: skip
def test_exit_status_of_errors(error: PetalsdError, code: int) -> None:
    """78 for what only a person can change, 74 for a lost device, 75 for what may pass, 1 for the rest."""
    assert exit_code_of(error) == code
