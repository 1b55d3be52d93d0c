"""petalsd/_C.pyi says what the built module has: the same classes, members, arguments and results."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import petalsd
from petalsd import _C

STUB = Path(petalsd.__file__).with_name("_C.pyi")


def stub_classes() -> dict[str, ast.ClassDef]:
    tree = ast.parse(STUB.read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def built_classes(module: ModuleType) -> dict[str, type]:
    return {name: value for name, value in vars(module).items() if inspect.isclass(value)}


def is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == "property" for mark in function.decorator_list)


def stub_members(cls: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}


def built_members(cls: type) -> set[str]:
    can_be_made = str(cls.__init__.__doc__).startswith("__init__(self: ")
    return {name for name in vars(cls) if not name.startswith("_")} | ({"__init__"} if can_be_made else set())


def built_signature(method: object) -> tuple[list[str], str]:
    """Argument names without self, and the result, from the first line that pybind11 puts into the docstring."""
    line = str(method.__doc__).splitlines()[0]
    arguments, result = re.fullmatch(r"\w+\((.*)\) -> (.*)", line).groups()
    return re.findall(r"(?:^|, )(\w+): ", arguments)[1:], result


def test_the_stub_has_the_classes_of_the_module() -> None:
    """No class is missing from the stub, none is invented."""
    assert set(stub_classes()) == set(built_classes(_C))


def test_the_stub_has_the_members_of_each_class() -> None:
    """Methods and properties have the same names and kinds."""
    for name, cls in built_classes(_C).items():
        members = stub_members(stub_classes()[name])
        assert set(members) == built_members(cls), name
        properties = {member for member, function in members.items() if is_property(function)}
        assert properties == {member for member in members if isinstance(vars(cls)[member], property)}, name


def test_the_stub_has_the_signatures_of_each_method() -> None:
    """Arguments have the same names in the same order, and results the same types."""
    checked = 0
    for name, cls in built_classes(_C).items():
        for member, function in stub_members(stub_classes()[name]).items():
            if is_property(function):
                continue
            arguments, result = built_signature(getattr(cls, member))
            assert [argument.arg for argument in function.args.args[1:]] == arguments, f"{name}.{member}"
            assert function.returns is not None
            assert ast.unparse(function.returns) == result.removeprefix("petalsd._C."), f"{name}.{member}"
            checked += 1
    assert checked >= 12
