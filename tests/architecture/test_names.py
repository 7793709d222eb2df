"""Names: `__all__` is sorted and true, the root shows what it should, no file is a drawer."""

from __future__ import annotations

import ast
import importlib
from types import ModuleType
from typing import Any

import pytest

import crossdock
import crossdock.errors
from tests.architecture.source import Source, findings, read_everything, read_package

DRAWERS = {"common.py", "helper.py", "helpers.py", "misc.py", "tools.py", "util.py", "utils.py"}


def find_drawers(source: Source) -> list[str]:
    """A file is named for what it does, not for being useful."""
    name = source.path.rpartition("/")[2]
    return [f"{source.path}: say what it does"] if name in DRAWERS else []


def find_unsorted_names(source: Source) -> list[str]:
    """Constants come first, then classes, then the rest; each name once."""
    names = exported(source)
    return (
        []
        if names == sorted(set(names), key=_by_kind)
        else [f"{source.path}: __all__ is not sorted"]
    )


def find_false_names(source: Source, namespace: dict[str, Any]) -> list[str]:
    """What `__all__` promises and the module does not have."""
    missing = [name for name in exported(source) if name not in namespace]
    return [f"{source.path}: __all__ names {name}, which is not there" for name in missing]


def find_forgotten_names(namespace: dict[str, Any], exports: list[str]) -> list[str]:
    """Public names that a package shows without saying so; its submodules are no names."""
    shown = {
        name
        for name, value in namespace.items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    return sorted(shown - set(exports))


def exported(source: Source) -> list[str]:
    """`__all__`, which is written out so that readers and tools can read it; empty without one."""
    for node in source.tree.body:
        match node:
            case ast.Assign(targets=[ast.Name("__all__")], value=value):
                return list(ast.literal_eval(value))
    return []


def _by_kind(name: str) -> tuple[bool, bool, str]:
    is_constant = name.isupper() and len(name) > 1
    return not is_constant, not name[0].isupper(), name


def module_name(source: Source) -> str:
    return source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def with_exports() -> list[Source]:
    return [source for source in read_everything() if exported(source) and not source.is_kernel]


@pytest.mark.parametrize("check", [find_drawers, find_unsorted_names])
def test_files_and_exports_are_in_order(check):
    report = findings(read_everything(), check)
    assert not report, report


@pytest.mark.parametrize("source", with_exports(), ids=module_name)
def test_exports_exist(source):
    assert find_false_names(source, vars(importlib.import_module(module_name(source)))) == []


def test_the_root_shows_what_it_exports():
    assert find_forgotten_names(vars(crossdock), crossdock.__all__) == []


def test_the_root_exports_every_error():
    assert set(crossdock.errors.__all__) <= set(crossdock.__all__)
    errors = {
        name
        for name, value in vars(crossdock.errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert errors == set(crossdock.errors.__all__)


def test_a_drawer_is_found():
    assert find_drawers(Source("crossdock/transports/utils.py", ""))


@pytest.mark.parametrize("names", ["['b', 'a']", "['a', 'a']", "('A', 'Z_Y')", "['a', 'B']"])
def test_disorder_is_found(names):
    assert find_unsorted_names(Source("crossdock/bad.py", f"__all__ = {names}"))


def test_a_false_name_is_found():
    source = Source("crossdock/bad.py", "__all__ = ['a', 'b']")
    assert find_false_names(source, {"a": 1}) == [
        "crossdock/bad.py: __all__ names b, which is not there"
    ]


def test_a_forgotten_name_is_found():
    namespace = {"Buffer": 1, "Config": 2, "_env": 3, "routing": ast}
    assert find_forgotten_names(namespace, ["Buffer"]) == ["Config"]


def test_order_passes():
    assert not find_unsorted_names(Source("crossdock/good.py", "__all__ = ['Z_Y', 'A', 'B', 'a']"))


def test_every_file_has_a_module_name():
    assert "crossdock.ops" in {module_name(source) for source in read_package()}
