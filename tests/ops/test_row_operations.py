"""The worked examples of the row operations, and the arithmetic they promise."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch

from crossdock import ops
from crossdock.ops import torch_ops

_INDICES = ("tokens", "row_splits", "slots")


def examples_of(verb: str) -> list[tuple[dict[str, Any], Any]]:
    """The worked examples of a docstring: arguments and result of each `... -> ...`."""
    text = re.search(r"Example:(.*)", getattr(ops, verb).__doc__, re.DOTALL).group(1)
    found, arguments = [], {}
    for part in " ".join(text.split()).split(";"):
        given, result = part.split("->")
        for name, value in re.findall(r"(\w+)=(.+?)(?=, \w+=|\s*$)", given.strip()):
            arguments[name] = ast.literal_eval(value)
        found.append((dict(arguments), ast.literal_eval(re.search(r"\[.*\]", result).group(0))))
    return found


def run(implementation: Any, verb: str, arguments: dict[str, Any], result: Any) -> list[Any]:
    indices = _INDICES + (("rows",) if verb == "place_rows" else ())
    tensors = {
        name: value
        if isinstance(value, int)
        else torch.tensor(value, dtype=torch.int64 if name in indices else torch.float32)
        for name, value in arguments.items()
    }
    if verb == "place_rows":
        implementation.place_rows(**tensors)
        return tensors["out"].tolist()
    if verb == "send":
        tensors["landing"] = torch.full((len(result), len(result[0])), torch.nan)
        implementation.send(**tensors)
        return tensors["landing"].tolist()
    return getattr(implementation, verb)(**tensors).tolist()


@pytest.mark.parametrize("implementation", [ops, torch_ops], ids=["package", "torch"])
@pytest.mark.parametrize("verb", ops.__all__)
def test_worked_examples(verb: str, implementation: Any) -> None:
    examples = examples_of(verb)
    assert examples
    for arguments, result in examples:
        assert run(implementation, verb, arguments, result) == result


def test_an_example_that_is_wrong_is_noticed() -> None:
    (arguments, result), *_ = examples_of("reduce")
    result[0][0] += 1
    assert run(torch_ops, "reduce", arguments, result) != result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [1, 7, 33, 4096])
@pytest.mark.parametrize("num_bias", [0, 1, 2])
def test_reduce_rounds_once_in_slot_order(dtype: torch.dtype, hidden: int, num_bias: int) -> None:
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.randn(300, hidden, generator=generator).to(dtype)
    lengths = torch.tensor([0, 1, 4, 22, 100, 3, 0])
    row_splits = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    slots = torch.randperm(300, generator=generator)[: int(row_splits[-1])]
    bias = [torch.randn(7, hidden, generator=generator).to(dtype) for _ in range(num_bias)]
    total = torch.zeros(7, hidden)
    for token in range(7):
        for slot in slots[row_splits[token] : row_splits[token + 1]]:
            total[token] += rows[slot].float()
        for term in bias:
            total[token] += term[token].float()
    assert torch.equal(torch_ops.reduce(rows, row_splits, slots, bias=bias), total.to(dtype))


def test_reduce_is_the_same_where_there_is_no_sparse_product() -> None:
    rows = torch.randn(40, 9).bfloat16()
    row_splits, slots = torch.tensor([0, 0, 5, 6, 20]), torch.randperm(40)[:20]
    sums = torch_ops._segment_sum_by_place(rows, row_splits, slots)
    assert torch.equal(sums, torch_ops.reduce(rows, row_splits, slots))


def test_reduce_does_not_read_rows_that_nobody_names() -> None:
    rows = torch.full((4, 8), torch.nan, dtype=torch.bfloat16)
    rows[2] = 1
    out = torch_ops.reduce(rows, torch.tensor([0, 1, 1]), torch.tensor([2]))
    assert out.tolist() == [[1.0] * 8, [0.0] * 8]


def test_reduce_rounds_ties_to_even() -> None:
    rows = torch.tensor([[1.0], [2.0**-8], [3 * 2.0**-8]], dtype=torch.bfloat16)
    out = torch_ops.reduce(rows, torch.tensor([0, 2, 4]), torch.tensor([0, 1, 0, 2]))
    assert out.flatten().tolist() == [1.0, 1 + 2.0**-6]


@pytest.mark.parametrize("hidden", [0, 5])
def test_reduce_of_nothing_is_zero(hidden: int) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    out = torch_ops.reduce(torch.empty(0, hidden), torch.zeros(4, dtype=torch.int64), nothing)
    assert out.shape == (3, hidden)
    assert not out.any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.bfloat16, torch.int32])
def test_send_and_place_move_every_bit(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (6, 16), dtype=torch.uint8)
    rows = raw.view(dtype)
    landing = torch.zeros_like(rows[:3])
    torch_ops.send(rows, torch.tensor([1, 4, 5]), landing)
    assert torch.equal(landing.view(torch.uint8), raw[[1, 4, 5]])
    torch_ops.send(rows, slice(2, 5), landing)
    assert torch.equal(torch_ops.place(landing, 3).view(torch.uint8), raw[2:5])
    assert not torch_ops.place(landing, 5).view(torch.uint8)[3:].any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
def test_place_rows_moves_every_bit_and_touches_nothing_else(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (5, 16), dtype=torch.uint8)
    out = torch.full((9, 16), 255, dtype=torch.uint8).view(dtype)
    rows, slots = torch.tensor([4, 0, 4]), torch.tensor([7, 2, 0])
    torch_ops.place_rows(raw.view(dtype), rows, slots, out=out)
    bits = out.view(torch.uint8)
    assert torch.equal(bits[slots], raw[rows])
    assert (bits[[1, 3, 4, 5, 6, 8]] == 255).all()


@pytest.mark.parametrize("hidden", [1, 33, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gather_reduce_rounds_once(hidden: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.randn(300, hidden, generator=generator).bfloat16()
    lengths = torch.tensor([0, 1, 4, 22, 3, 0, *[2] * 40])
    row_splits = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    slots = torch.randint(0, 300, (int(row_splits[-1]),), generator=generator)
    weights = torch.rand(slots.shape, generator=generator)
    exact = torch.zeros(len(lengths), hidden, dtype=torch.float64)
    sizes = torch.zeros_like(exact)
    for number in range(len(lengths)):
        for at in range(int(row_splits[number]), int(row_splits[number + 1])):
            exact[number] += rows[slots[at]].double() * weights[at].double()
            sizes[number] += (rows[slots[at]].double() * weights[at].double()).abs()
    got = torch_ops.gather_reduce(rows, row_splits, slots, weights=weights, dtype=dtype)
    assert got.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((got.double() - exact).abs() <= rounding + 24 * 2.0**-24 * sizes).all()


def test_gather_reduce_is_the_same_where_there_is_no_sparse_product() -> None:
    rows, weights = torch.randn(40, 9), torch.rand(20)
    row_splits, slots = torch.tensor([0, 0, 5, 6, 20]), torch.randperm(40)[:20]
    sums = torch_ops._segment_sum_by_place(rows, row_splits, slots, weights=weights)
    torch.testing.assert_close(
        sums, torch_ops.gather_reduce(rows, row_splits, slots, weights=weights)
    )


def test_gather_reduce_does_not_read_rows_that_nobody_names() -> None:
    rows = torch.full((4, 8), torch.nan, dtype=torch.bfloat16)
    rows[2] = 2
    out = torch_ops.gather_reduce(
        rows, torch.tensor([0, 1, 1]), torch.tensor([2]), weights=torch.tensor([0.5])
    )
    assert out.tolist() == [[1.0] * 8, [0.0] * 8]
