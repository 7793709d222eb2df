"""Every kernel compiles, without a GPU, for every architecture, to the code it was written for.

Rows that are made of 16-byte words move in those; where they are, registers do not spill; and what
other GPUs see is ordered for the whole system. Two processes compile what all tests here ask for,
while the tests look at what is there already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import crossdock

CAPABILITIES = [80, 90, 100]
EVERYWHERE = {
    "lay_out_tokens": {},
    "dispatch_experts fp8": {"form": "fp8"},
    "dispatch_experts bf16, compact": {"compact": True, "brings_weights": True},
    "combine_experts": {},
    "combine_experts fp32": {"is_float": True, "brings_weights": True},
    "combine_experts logfmt": {"is_log": True, "brings_weights": True},
    "combine_experts of slabs, given compact rows": {"is_turned": True},
    "leave_experts fp8": {"form": "fp8", "brings_weights": True},
    "return_experts": {"brings_weights": True},
    "return_experts read": {"brings_weights": True, "pulls": True},
    "route_ranks": {},
    "send_ranks bf16": {"brings_weights": True},
    "send_ranks fp8": {"form": "fp8", "brings_weights": True},
    "place_ranks bf16": {"brings_weights": True},
    "place_ranks fp8": {"form": "fp8", "brings_weights": True},
    "combine_ranks": {},
    "combine_ranks with weights and biases": {"brings_weights": True, "num_bias": 2},
}
FEW = {"hidden": 7, "num_topk": 3, "num_local": 2, "num_ranks": 3}
ALONE = {"num_ranks": 1}
ON_90 = {
    "dispatch_experts ue8m0": {"form": "fp8_ue8m0"},
    "dispatch_experts int8": {"form": "int8", "compact": True},
    "dispatch_experts of odd width": FEW,
    "combine_experts of odd width": FEW,
    "combine_experts of compact rows, given slabs": {"compact": True, "is_turned": True},
    "route_ranks without experts": {"num_topk": 0, "num_local": 2, "num_ranks": 3},
    "send_ranks of odd width": {**FEW, "num_topk": 0},
    "place_ranks of odd width": {**FEW, "num_topk": 0},
    "combine_ranks of odd width": FEW,
    "combine_ranks fp32": {"is_float": True},
    "dispatch_experts alone": ALONE,
    "send_ranks alone": ALONE,
    "combine_ranks alone": ALONE,
    "dispatch_experts of eight": {"form": "fp8", "num_ranks": 8, "num_local": 32},
    "combine_ranks of eight": {"num_ranks": 8},
    "combine_ranks with weights": {"brings_weights": True, "counts_waits": True},
    "combine_ranks of eight, narrow": {"num_ranks": 8, "hidden": 1024, "brings_weights": True},
    "combine_ranks with few programs": {"is_few": True},
    "send_ranks with few programs": {"form": "fp8", "brings_weights": True, "is_few": True},
    "place_ranks with few programs": {"form": "fp8", "brings_weights": True, "is_few": True},
    "route_ranks with waits": {"counts_waits": True},
    "send_ranks of views": {"brings_weights": True, "viewed": True},
    "place_ranks of views": {"brings_weights": True, "viewed": True, "counts_waits": True},
    "dispatch_experts checked": {"form": "fp8", "checked": True},
    "combine_experts checked": {"checked": True},
    "dispatch_experts shrinking": {"form": "fp8", "shrinks": True},
    "combine_experts shrinking": {"shrinks": True},
    "leave_experts bf16, of eight": {"num_ranks": 8, "num_local": 32},
    "leave_experts of odd width": FEW,
    "return_experts of odd width": {**FEW, "brings_weights": True},
    "return_experts read, of odd width": {**FEW, "brings_weights": True, "pulls": True},
    "leave_experts checked": {"form": "fp8", "checked": True},
    "leave_experts shrinking": {"form": "fp8", "shrinks": True},
    "return_experts shrinking": {"brings_weights": True, "shrinks": True},
    "send_ranks checked": {"checked": True},
    "place_ranks checked": {"checked": True},
    "combine_ranks checked": {"checked": True},
}
SPILLING = (
    "combine_experts",
    "combine_experts fp32",
    "combine_experts logfmt",
    "combine_experts of slabs, given compact rows",
    "dispatch_experts bf16, compact",
    "dispatch_experts int8",
    "leave_experts fp8",
)
"""Which still keep a few registers on the stack, on one of the architectures or Triton versions."""

UNHURRIED = ("of odd width", "alone", "checked", "shrinking")
"""Where registers may spill."""
CASES = [(name, capability) for name in EVERYWHERE for capability in CAPABILITIES]
CASES += [(name, 90) for name in ON_90]

WIDE = {
    ("words", "ld"): "v2.b64",
    ("words", "st"): "v2.b64",
    ("elements", "ld"): "v4.b32",
    ("elements", "st"): "v4.b32",
    ("encoded", "ld"): "v4.b32",
    ("encoded", "st"): "v2.b32",
}
"""How 16 bytes are read and written, by what they are; a warp writes whole lines of 8 as well."""
RELEASE = r"\batom\.global\.sys\.release\.exch\.b32\s"
ACQUIRE = r"\batom\.global\.sys\.acquire\.add\.u32\s|\bld\.acquire\.sys\.global\S*\s"
TAGGED = r"\bld\.volatile\.global\.b64\s"
TOO_NARROW = r"\b\w+[\w.]*\.(?:cta|gpu|cluster)\.(?:release|acquire|acq_rel)\b\S*"
"""An order that other GPUs need not see."""

ACQUIRES = {
    "dispatch_experts",
    "combine_experts",
    "leave_experts",
    "return_experts",
    "route_ranks",
    "send_ranks",
    "place_ranks",
    "combine_ranks",
}
RELEASES = ACQUIRES - {"place_ranks"}
"""What raises flags or tells how far it is; placing does neither."""

OVERLAPS = {"dispatch_experts", "combine_experts", "leave_experts", "return_experts"}
FOLLOWS = r"\bgriddepcontrol\.wait;"
"""What a kernel waits by for the one before it, and has to before it touches any memory."""
TOUCHES = r"\b(ld|st|atom|red)(\.volatile)?\.global\b"

Code = Any
"""A `kernels.Compiled`."""


def prepare() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def compile_case(name: str, capability: int) -> Code:
    from tests.aot.kernels import Shape, compile_shape

    shape = Shape(kernel_of(name), **{**EVERYWHERE, **ON_90}[name])
    return compile_shape(capability, shape)


def kernel_of(name: str) -> str:
    return name.split()[0]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[[str, int], Code]]:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with ProcessPoolExecutor(2, get_context("spawn"), prepare) as pool:
        futures = {case: pool.submit(compile_case, *case) for case in CASES}
        yield lambda *case: futures[case].result(timeout=100)
        pool.shutdown(cancel_futures=True)


def code_faults(name: str, capability: int, code: Code) -> list[str]:
    """What is wrong with a compiled kernel."""
    kernel, wanted = kernel_of(name), code.wide._asdict()
    faults = []
    excused = name.endswith(UNHURRIED) or (name in SPILLING and "LOCAL:0" in code.usage)
    if not excused and not is_without_spills(code.usage):
        faults.append(f"spills: {code.usage}")
    for (what, kind), type_ in WIDE.items():
        num = count(rf"\b{kind}\.global\S*\.{re.escape(type_)}\s", code.ptx)
        if num < wanted[what]:
            faults.append(f"{num} {kind} of {type_}, to move a tile takes {wanted[what]}")
    if kernel in RELEASES and not count(RELEASE, code.ptx):
        faults.append("nothing is released to the system")
    if kernel in ACQUIRES and not count(ACQUIRE, code.ptx):
        faults.append("nothing is acquired from the system")
    begin = re.split(TOUCHES, code.ptx, maxsplit=1)[0]
    if (kernel in OVERLAPS and capability >= 90) != bool(count(FOLLOWS, begin)):
        faults.append("it should wait for the kernel before on 9.0 and newer, if it overlaps")
    return faults + re.findall(TOO_NARROW, code.ptx)


def count(pattern: str, ptx: str) -> int:
    return len(re.findall(pattern, ptx))


def is_without_spills(usage: str) -> bool:
    """Registers that do not suffice are kept on the stack."""
    return "STACK:0 " in usage and "LOCAL:0" in usage


@pytest.mark.parametrize(("name", "capability"), CASES)
def test_kernels_compile_to_what_they_were_written_for(compiled, name, capability):
    assert not code_faults(name, capability, compiled(name, capability))


MOVED = {
    "dispatch_experts fp8": {"words", "encoded"},
    "dispatch_experts bf16, compact": {"words"},
    "combine_experts": {"elements"},
    "send_ranks fp8": {"words"},
    "place_ranks bf16": {"words"},
    "combine_ranks": {"words", "elements"},
    "combine_ranks alone": {"elements"},
    "send_ranks of odd width": set(),
}


@pytest.mark.parametrize("name", MOVED)
def test_wide_words_are_asked_for_where_rows_are_made_of_them(compiled, name):
    wanted = compiled(name, 90).wide._asdict()
    assert {what for what, num in wanted.items() if num} == MOVED[name]


@pytest.mark.parametrize("name", ["dispatch_experts fp8", "combine_experts", "route_ranks"])
def test_small_data_is_polled_in_single_words(compiled, name):
    """Data and number of a tagged word are seen together, or the one without the other."""
    assert count(TAGGED, compiled(name, 90).ptx)


def test_every_kernel_is_compiled(compiled):
    kernels = {kernel_of(name) for name, _ in CASES}
    assert kernels == ACQUIRES | {"lay_out_tokens"}
    assert set(find_launched()) == ACQUIRES


def find_launched() -> list[str]:
    """The kernels that there are: what draws tickets."""
    folder = Path(crossdock.__file__).parent / "ops" / "triton"
    texts = [path.read_text("utf-8") for path in sorted(folder.glob("*.py"))]
    functions = [part for text in texts for part in text.split("@triton.jit\ndef ")[1:]]
    return [part.split("(")[0] for part in functions if "= draw_ticket(" in part]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"(ld\.global\S*)\.v4\.b32", r"\1.b32"),
        (r"(st\.global\S*)\.v4\.b32", r"\1.b32"),
        (r"(ld\.global\S*)\.v2\.b64", r"\1.b64"),
        (r"(st\.global\S*)\.v2\.b64", r"\1.b64"),
        (r"\.sys\.release", ".gpu.release"),
        (r"\.sys\.acquire", ".sys.relaxed"),
    ],
)
def test_other_code_would_be_found(compiled, old, new):
    code = compiled("combine_ranks", 90)
    ptx = re.sub(old, new, code.ptx)
    assert ptx != code.ptx
    assert code_faults("combine_ranks", 90, code._replace(ptx=ptx))


def test_coming_too_early_would_be_found(compiled):
    code = compiled("combine_experts fp32", 90)
    parts = re.split(FOLLOWS, code.ptx)
    late = code._replace(ptx="".join(parts) + "griddepcontrol.wait;")
    assert len(parts) == 2
    assert code_faults("combine_experts fp32", 90, late)


@pytest.mark.parametrize("usage", ["REG:255 STACK:8 SHARED:0 LOCAL:0", "REG:9 STACK:0 LOCAL:16"])
def test_spills_would_be_found(compiled, usage):
    code = compiled("place_ranks bf16", 90)
    assert code_faults("place_ranks bf16", 90, code._replace(usage=usage))
