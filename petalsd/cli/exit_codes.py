"""What the exit status of ``petalsd`` means; argparse adds 2 for bad usage."""

from __future__ import annotations

from petalsd.errors import (
    AddressUnavailable,
    ConfigError,
    DeadlineExceeded,
    DeviceLost,
    ModelError,
    PetalsdError,
    SwarmError,
    WeightsError,
)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_DEVICE_LOST = 74  # EX_IOERR: another process may get the device back
EXIT_TEMPORARY = 75  # EX_TEMPFAIL: a restart may help
EXIT_BAD_CONFIG = 78  # EX_CONFIG: a restart cannot help (RestartPreventExitStatus= in a unit)
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # the reader of our output went away


def exit_code_of(error: PetalsdError) -> int:
    """Weights, peers, addresses and time may come back; a bad configuration or model will not."""
    if isinstance(error, DeviceLost):
        return EXIT_DEVICE_LOST
    if isinstance(error, WeightsError | SwarmError | DeadlineExceeded | AddressUnavailable):
        return EXIT_TEMPORARY
    return EXIT_BAD_CONFIG if isinstance(error, ConfigError | ModelError) else EXIT_FAILED
