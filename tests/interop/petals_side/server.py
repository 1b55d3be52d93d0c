"""A stock server as its command line starts it; it also says what each look at its placement came to."""

from __future__ import annotations

from typing import Any

from petals.cli.run_server import main
from petals.server import block_selection

_decide = block_selection.should_choose_other_blocks


def should_choose_other_blocks(*args: Any, **kwargs: Any) -> bool:
    """What the published function decides."""
    moves = _decide(*args, **kwargs)
    print("placement checked:", "moves" if moves else "stays", flush=True)  # noqa: T201 - read by the tests
    return moves


if __name__ == "__main__":
    block_selection.should_choose_other_blocks = should_choose_other_blocks
    main()
