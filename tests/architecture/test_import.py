"""Importing crossdock is quiet: it costs little, loads nothing optional and starts nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

OPTIONAL = {"matplotlib", "mpi4py", "numpy", "rich", "triton", "typer"}
LIMIT_S = 0.3
NUM_RUNS = 3

PROBE = """
import json, os, sys, threading, time
import torch

def observe():
    return {
        "environment": dict(os.environ),
        "threads": len(os.listdir("/proc/self/task")),
        "files": sorted(os.listdir("/proc/self/fd")),
        "cuda": torch.cuda.is_initialized(),
        "distributed": torch.distributed.is_initialized(),
        "dtype": str(torch.get_default_dtype()),
        "num_threads": torch.get_num_threads(),
    }

modules, before = set(sys.modules), observe()
began = time.perf_counter()
{statement}
seconds = time.perf_counter() - began
after = observe()
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - modules),
    "changed": sorted(key for key in before if before[key] != after[key]),
}))
"""
"""Imports torch, then runs the statement, and tells what the statement did."""

JOIN_A_GROUP = """
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""


def observe_import(statement: str) -> dict[str, Any]:
    """Run a statement in a fresh process that has torch, and return what it changed there."""
    code = PROBE.replace("{statement}", statement)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    return json.loads(done.stdout)


def find_noise(seen: dict[str, Any]) -> list[str]:
    """What an import did that it should not."""
    loaded = sorted({name.partition(".")[0] for name in seen["modules"]} & OPTIONAL)
    return [f"loads {name}" for name in loaded] + [f"changes {key}" for key in seen["changed"]]


@cache
def imports_of_crossdock() -> list[dict[str, Any]]:
    return [observe_import("import crossdock") for _ in range(NUM_RUNS)]


def test_importing_is_quiet():
    seen = imports_of_crossdock()[0]
    assert "crossdock.buffer" in seen["modules"]
    assert find_noise(seen) == []


def test_importing_is_fast():
    # The quickest run: the others measure what else the machine was doing.
    assert min(seen["seconds"] for seen in imports_of_crossdock()) < LIMIT_S


@pytest.mark.parametrize(
    ("statement", "noise"),
    [
        ("import rich", "loads rich"),
        ("os.environ['X'] = '1'", "changes environment"),
        ("threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "changes threads"),
        ("file = open(os.devnull)", "changes files"),
        ("torch.set_default_dtype(torch.float64)", "changes dtype"),
        (JOIN_A_GROUP, "changes distributed"),
    ],
)
def test_noise_is_found(statement, noise):
    assert noise in find_noise(observe_import(statement))


def test_a_slow_import_is_found():
    assert observe_import(f"time.sleep({LIMIT_S})")["seconds"] >= LIMIT_S
