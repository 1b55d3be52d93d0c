"""Importing what is heavy: torch, transformers and hivemind make 430 000 objects, and keep nearly all of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import within this block, and what there is at its end is never searched for garbage.

    To search again and again while it grows takes a quarter of the time, and once more at the end of a short
    command. In a daemon each search would stop the loop and the engine for tenths of a second, in the middle of
    somebody's steps.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
