"""Imports go down only, and never in a circle."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from tests.architecture.source import ROOT, Source, read_package


def find_broken_contracts(root: Path) -> str:
    """What import-linter reports for the tree at `root`; empty when every contract is kept."""
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "NO_COLOR": "1"}
    done = subprocess.run(
        [*command, "--no-cache"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty when there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def find_own_imports(source: Source) -> list[str]:
    """What a file imports of the library it belongs to."""
    names = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("crossdock" if node.level else str(node.module))
    return [name for name in names if name.partition(".")[0] == "crossdock"]


def test_the_floors_hold():
    report = find_broken_contracts(ROOT)
    assert not report, report


def test_nothing_imports_itself():
    graph = grimp.build_graph("crossdock", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(imports) > 10
    assert find_cycle(imports) == []


def test_the_oracle_stands_alone():
    (oracle,) = (source for source in read_package() if source.path == "crossdock/reference.py")
    assert find_own_imports(oracle) == []


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, to break."""
    shutil.copytree(ROOT / "src" / "crossdock", tmp_path / "src" / "crossdock")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("errors.py", "import crossdock.buffer", "Floors: imports go down only"),
        ("topology.py", "from crossdock import Buffer", "Floors: imports go down only"),
        ("codec.py", "from crossdock import layouts", "Floors: imports go down only"),
        ("drawer.py", "x = 1", "Floors: imports go down only"),
        ("reference.py", "from crossdock import formats", "The oracle imports nothing it judges"),
        ("ops/torch_ops.py", "import crossdock.topology", "ops knows tensors, not the library"),
        ("transports/heap_cuda.py", "import crossdock.transports.heap_shm", "Heaps do not know"),
    ],
)
def test_an_import_upwards_is_found(copy, path, line, contract):
    with (copy / "src" / "crossdock" / path).open("a") as file:
        file.write(f"\n{line}\n")
    report = find_broken_contracts(copy)
    broken = [told for told in report.splitlines() if told.endswith("BROKEN")]
    assert any(told.startswith(contract) for told in broken), report


def test_a_cycle_is_found():
    circle = find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})
    assert set(circle) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "line",
    ["from . import errors", "import crossdock", "from crossdock.routing import RoutingTable"],
)
def test_an_import_of_the_oracle_is_found(line):
    assert find_own_imports(Source("crossdock/reference.py", f"import torch\n{line}"))
