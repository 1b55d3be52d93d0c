"""Makes Triton's interpreter waste less time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from triton.runtime import interpreter


def patch_the_language_once() -> None:
    """Of each function of a kernel, not at each of its calls.

    Whenever one is called, the interpreter looks through all members of Triton's language for operations to
    replace by its own, which takes up to 40 % of a test. Here they stay replaced, also after a launch.
    """
    patch: Callable[[Any], object] = interpreter._patch_lang

    @cache
    def patch_once(function: Any) -> object:
        patch(function)
        return interpreter._LangPatchScope()  # of nothing: it has nothing to restore

    interpreter._patch_lang = patch_once
