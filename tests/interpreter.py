"""Makes Triton's interpreter waste less time, and tell of integers that overflow.

It runs a kernel operation by operation, and most of what one takes is not numpy's: types and shapes are built and
looked up anew for each. What it computes stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from triton import language
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
}


def quicken_the_interpreter() -> None:
    """Once in a process, before the first launch."""
    _patch_the_language_once()
    _look_up_dtypes()
    _share_shapes()
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _patch_the_language_once() -> None:
    """Of each function of a kernel, not at each of its calls.

    Whenever one is called, the interpreter looks through all members of Triton's language for operations to
    replace by its own. Here they stay replaced, also after a launch.
    """
    patch: Callable[[Any], object] = interpreter._patch_lang

    @cache
    def patch_once(function: Any) -> object:
        patch(function)
        return interpreter._LangPatchScope()  # of nothing: it has nothing to restore

    interpreter._patch_lang = patch_once


def _look_up_dtypes() -> None:
    """numpy's of a type, which the interpreter finds by making a table of all of them."""
    original: Callable[[Any], np.dtype[Any]] = interpreter._get_np_dtype
    pointer, found = np.dtype(np.uint64), dict[str, np.dtype[Any]]()

    def lookup(type: Any) -> np.dtype[Any]:
        element = type.element_ty if isinstance(type, language.block_type) else type
        if isinstance(element, language.pointer_type):
            return pointer
        if element.name not in found:
            found[element.name] = original(element)
        return found[element.name]

    interpreter._get_np_dtype = lookup


def _share_shapes() -> None:
    """Blocks of one type and shape, and values of one type, have their shapes and names from the first one."""
    make_type, make_tensor = language.block_type.__init__, language.tensor.__init__
    types, shapes = dict[Any, dict[str, Any]](), dict[Any, tuple[Any, Any]]()

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (getattr(size, "value", size) for size in getattr(shape, "value", shape))
        key = str(element_ty), getattr(element_ty, "address_space", None), *sizes
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = {**vars(self), "key": key}
        self.__dict__.update(types[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = getattr(type, "key", None)
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    language.block_type.__init__ = init_type
    language.tensor.__init__ = init_tensor


def _check_overflow(semantic: Any, left: Any, right: Any, operation: Any) -> None:
    """By numpy in 64 bits. The interpreter computes as much by nine operations of its own, and looks at none."""
    element = left.type.scalar
    if element.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    wide = (np.asarray(side.handle.data).astype(np.int64) for side in (left, right))
    result = _OPERATIONS[operation.__name__](*wide)
    least, greatest = element.get_int_min_value(), element.get_int_max_value()
    assert least <= result.min() and result.max() <= greatest, (
        f"int{element.int_bitwidth} overflow detected for operation {operation.__name__}"
    )
