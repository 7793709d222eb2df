"""The package as text and syntax trees, for the tests that hold the architecture.

A check is a function from a `Source` (or from plain values) to a list of findings, each one line
that says where and what. So every check can also be given a few lines of bad code, and has to
report them: a check that finds nothing anywhere proves nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A file of the package: its path below `src`, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def is_kernel(self) -> bool:
        return self.path.startswith("crossdock/ops/triton/")

    def at(self, node: ast.stmt | ast.expr, what: str) -> str:
        return f"{self.path}:{node.lineno}: {what}"

    def functions(self) -> Iterator[tuple[Function, ast.AST]]:
        """Every function with the node that holds it, nested ones and methods included."""
        for parent in ast.walk(self.tree):
            for child in ast.iter_child_nodes(parent):
                if isinstance(child, Function):
                    yield child, parent


def read_package() -> list[Source]:
    return _read(ROOT / "src")


def read_everything() -> list[Source]:
    """The package and the shim."""
    return read_package() + _read(ROOT / "shim" / "src")


def findings(sources: list[Source], check: Callable[[Source], list[str]]) -> str:
    """What a check reports, a line each; empty when all is well."""
    return "\n".join(finding for source in sources for finding in check(source))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression that is such a chain, otherwise an empty string."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


def _read(src: Path) -> list[Source]:
    paths = sorted(path for path in src.rglob("*.py") if ".egg-info" not in path.as_posix())
    return [Source(path.relative_to(src).as_posix(), path.read_text("utf-8")) for path in paths]
