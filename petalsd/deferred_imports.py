"""What libraries do when they are imported, for things that nothing here asks of them: left until somebody does.

Measured with transformers 5.23 and hivemind 1.1.12:

  transformers  Among the checks of config values is one of an activation's name, which some speech models ask for.
                The names come with the activations, these with what may replace them, and so with the compiler of
                torch, its distributed tensors and sympy.
  hivemind      Averaging of parameters is balanced by scipy's optimizers.

Both together are 2.9 s of the 7.4 for which a daemon imports, and 190 MB. Besides, transformers lists what each of
its 1,600 files defines, twice, and takes them apart into lines for it: done once, and without, it takes a third.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import LazyLoader
from types import ModuleType

_ACTIVATIONS = "transformers.activations"
_CONFIG_CHECKS = "transformers.utils.type_validators"
_IMPORT_TOOLS = "transformers.utils.import_utils"
_LAZY = frozenset({"scipy.optimize"})
"""Modules of which an import statement takes no name, so that they can wait for the first use of one."""


@contextmanager
def deferred_imports() -> Iterator[None]:
    """Modules of the libraries that are first imported within this block leave out what is listed above."""
    finder = _Deferring()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Deferring(MetaPathFinder):
    """Finds the few modules that are imported in another way than they would be."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _LOADERS and fullname not in _LAZY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        if fullname in _LAZY:
            spec.loader = LazyLoader(spec.loader)
        else:
            spec.loader = _LOADERS[fullname](spec.loader.name, spec.loader.path)
        return spec


class _ConfigChecks(SourceFileLoader):
    """Loads transformers' checks of config values as if there were no activations: names are not checked then."""

    def exec_module(self, module: ModuleType) -> None:
        if _ACTIVATIONS in sys.modules:
            super().exec_module(module)
            return
        stand_in = ModuleType(_ACTIVATIONS)
        stand_in.ACT2FN = {}  # type: ignore[attr-defined]
        sys.modules[_ACTIVATIONS] = stand_in
        try:
            super().exec_module(module)
            return
        except ImportError:
            pass  # a release that needs more of them shall have them
        finally:
            del sys.modules[_ACTIVATIONS]
        super().exec_module(module)


class _ImportTools(SourceFileLoader):
    """Loads what makes transformers' list of names so that it is made once, and of the lines that say them."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        try:
            list_names, names_of = module.create_import_structure_from_path, module.fetch__all__
        except AttributeError:
            return  # a release that does it in another way

        def list_names_once(path: str | os.PathLike[str]) -> object:
            # It remembers its answers, but is asked for a directory as a Path, and then as a file in it.
            return list_names(os.path.dirname(path) if os.path.isfile(path) else os.fspath(path))

        def names_of_end(text: str) -> object:
            return names_of(text[max(text.rfind("\n__all__"), 0) :])

        module.create_import_structure_from_path = list_names_once  # type: ignore[attr-defined]
        module.fetch__all__ = names_of_end  # type: ignore[attr-defined]


_LOADERS = {_CONFIG_CHECKS: _ConfigChecks, _IMPORT_TOOLS: _ImportTools}
