"""Every variable that is read is documented, and every documented variable is read."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from crossdock import _env
from tests.architecture.source import ROOT

ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| (?:`(?P<default>[^`]*)`|none) \| (?P<meaning>.*) \|$", re.MULTILINE
)


def documented(markdown: str) -> dict[str, tuple[str, str]]:
    """Name -> (default, meaning) of each row of the table; `none` stands for an empty default."""
    return {row["name"]: (row["default"] or "", row["meaning"]) for row in ROW.finditer(markdown)}


def find_differences(variables: Iterable[_env.Variable], markdown: str) -> list[str]:
    table = documented(markdown)
    code = {variable.name: (variable.default, variable.meaning) for variable in variables}
    return [
        f"{name}: code has {code.get(name)}, the table has {table.get(name)}"
        for name in sorted(code.keys() | table.keys())
        if code.get(name) != table.get(name)
    ]


def test_the_table_is_true():
    markdown = (ROOT / "docs" / "environment.md").read_text("utf-8")
    assert documented(markdown)
    assert find_differences(_env.VARIABLES, markdown) == []


def test_names_are_sorted_and_ours():
    names = [variable.name for variable in _env.VARIABLES]
    assert names == sorted(set(names))
    ours = [name for name in names if name != "TRITON_INTERPRET"]
    assert all(name.startswith("CROSSDOCK_") for name in ours)


@pytest.mark.parametrize(
    "markdown",
    [
        "",
        "| `CROSSDOCK_A` | `2` | how many |",
        "| `CROSSDOCK_A` | `1` | how few |",
        "| `CROSSDOCK_A` | none | how many |",
        "| `CROSSDOCK_A` | `1` | how many |\n| `CROSSDOCK_B` | none | nothing reads it |",
    ],
)
def test_a_difference_is_found(markdown):
    variables = [_env.Variable("CROSSDOCK_A", "1", "how many")]
    assert find_differences(variables, markdown)
    assert not find_differences(variables, "| `CROSSDOCK_A` | `1` | how many |")
