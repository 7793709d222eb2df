"""Code written for the low-latency calls, run unchanged on CPU tensors in real processes.

`low_latency_program` and `ascend_program` check themselves, within the bounds of the tests whose
shape they have; `decoding_client` is judged here. The clients import `deep_ep` only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import deep_ep
from crossdock import reference, reference_low_latency
from crossdock.worlds import Pool
from deep_ep.utils.math import per_token_cast_back, per_token_cast_to_fp8
from tests.compat import ascend_program, decoding_client, low_latency_program
from tests.compat.decoding_client import Batch

HIDDEN = 512
NUM_ROUNDS = 24  # three kinds of tokens, with and without a hook, four formats
ROUNDING_BOUND = 1e-5


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_twice(
    group: dist.ProcessGroup, num_tokens: int
) -> tuple[low_latency_program.Report, low_latency_program.Report]:
    """Both reports, under the default dtype that DeepEP's helpers set."""
    with default_dtype(torch.bfloat16):
        first, second = (low_latency_program.run(group, num_tokens, HIDDEN) for _ in range(2))
    return first, second


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_deep_eps_low_latency_test_shape(pool: Pool, num_ranks: int) -> None:
    """Every format and every way back; two runs receive the same bytes."""
    for first, second in pool.run(run_twice, 24, num_ranks=num_ranks):
        assert first == second
        assert (first.num_rounds, first.masked) == (NUM_ROUNDS, [])
        assert first.hash_value != 0


def run_shrinking(group: dist.ProcessGroup, num_tokens: int) -> low_latency_program.Report:
    """The program knows nothing of deadlines: they come from outside."""
    deadlines = {"CROSSDOCK_TIMEOUT_S": "3", "CROSSDOCK_FIRST_CALL_TIMEOUT_S": "3"}
    with mock.patch.dict(os.environ, deadlines):
        return low_latency_program.run(group, num_tokens, HIDDEN, shrink=True)


def test_deep_eps_shrink_test_shape(pool: Pool) -> None:
    """Rank 1 never dispatches, rank 3 never combines; the others pass every round without them."""
    reports = pool.run(run_shrinking, 16)
    assert [report.num_rounds for report in reports] == [8, 0, 8, 0]
    assert [reports[rank].masked for rank in (0, 2)] == [[1, 3], [1, 3]]


FORMATS = {
    "bf16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "fp8_ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}
SIZES = [7, 0, 1, 12]
"""Tokens of each rank: the second micro-batch of ranks 1 and 2 is empty, so is the first of 1."""


def make_batches(num_experts: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for num_tokens in SIZES:
        x = torch.randn((num_tokens, HIDDEN), generator=generator, dtype=torch.float32)
        idx = torch.randint(-1, num_experts, (num_tokens, 4), generator=generator)
        weights = torch.rand(idx.shape, generator=generator, dtype=torch.float32)
        batches.append(Batch(x.bfloat16(), idx, weights))
    return batches


def make_experts(num_experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    size = (num_experts, HIDDEN, HIDDEN)
    return torch.randn(size, generator=generator, dtype=torch.float32) * HIDDEN**-0.5


def serve(
    group: dist.ProcessGroup,
    batches: list[Batch],
    formats: dict[str, bool],
    use_threads: bool,
) -> list[torch.Tensor]:
    experts = make_experts(2 * group.size())
    return decoding_client.serve(group, batches[group.rank()], experts, formats, use_threads)


@pytest.mark.parametrize("use_threads", [False, True], ids=["one thread", "two threads"])
@pytest.mark.parametrize("form", FORMATS)
def test_overlapping_micro_batches(pool: Pool, form: str, use_threads: bool) -> None:
    """Each layer against float64 on what travelled; a second layer starts from the first's output.

    Three roundings to bf16 are left: the experts' outputs, the sums of a rank, the result.
    """
    batches, experts = make_batches(8), make_experts(8)
    seen = pool.run(serve, batches, FORMATS[form], use_threads)
    for batch, outputs in zip(batches, seen, strict=True):
        prefilled, first, second, prefilled_again, *decoded_again = outputs
        for got in (prefilled, prefilled_again):
            check_layer(batch, batch.x, experts, got)
        check_layer(batch, travelled(batch.x, form), experts, first)
        check_layer(batch, travelled(first, form), experts, second)
        assert torch.equal(torch.stack(decoded_again), torch.stack([first, second]))


def travelled(x: torch.Tensor, form: str) -> torch.Tensor:
    """What the experts are given for `x`."""
    rows = reference_low_latency.decode(reference_low_latency.encode(x, form), form)
    return rows.bfloat16()


def check_layer(batch: Batch, x: torch.Tensor, experts: torch.Tensor, got: torch.Tensor) -> None:
    wanted = torch.zeros(x.shape, dtype=torch.float64)
    for expert, matrix in enumerate(experts):
        weights = (batch.topk_weights * (batch.topk_idx == expert)).sum(dim=1, keepdim=True)
        wanted += weights.double() * (x.double() @ matrix.double())
    assert got.shape == wanted.shape
    assert not bool(got.isnan().any())
    assert reference.calc_diff(got, wanted) < ROUNDING_BOUND


def serve_elastic(
    group: dist.ProcessGroup, batches: list[Batch], leaving: int
) -> list[tuple[list[int], list[torch.Tensor]]]:
    experts = make_experts(2 * group.size())
    return decoding_client.serve_elastic(group, batches[group.rank()], experts, leaving)


def test_a_rank_leaves_and_comes_back(pool: Pool) -> None:
    """While it is away its experts add nothing; afterwards everything is as it was before."""
    batches, leaving = make_batches(8), 3
    reduced = make_experts(8)
    reduced[2 * leaving :] = 0
    for rank, (before, away, after) in enumerate(pool.run(serve_elastic, batches, leaving)):
        masks = [masked for masked, _ in (before, away, after)]
        assert masks == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
        assert torch.equal(torch.stack(before[1]), torch.stack(after[1]))
        if rank == leaving:
            assert away[1] == []
            continue
        inputs = (batches[rank].x, away[1][0])
        for x, got in zip(inputs, away[1], strict=True):
            check_layer(batches[rank], x, reduced, got)


def wait_for_one(group: dist.ProcessGroup, batches: list[Batch], slow: int) -> list[list[int]]:
    """What a rank has waited for each, where one comes late to all calls after the first two."""
    mine = make_experts(2 * group.size())[2 * group.rank() :][:2]
    server = decoding_client.Server(group, mine, max(SIZES), FORMATS["fp8"])
    server.decode_alone(batches[group.rank()])
    dist.barrier(group=group)
    server.waited_us.zero_()
    for hook in server.decode(batches[group.rank()], []):
        if group.rank() == slow:
            time.sleep(0.1)
        hook()
    return server.waited_us.tolist()


def test_a_slow_rank_shows_as_waiting(pool: Pool) -> None:
    """It sleeps after each of four sends: the others wait for the sends that come after."""
    slow = 2
    for rank, (dispatch, combine) in enumerate(pool.run(wait_for_one, make_batches(8), slow)):
        waits = [a + b for a, b in zip(dispatch, combine, strict=True)]
        assert waits[rank] == 0
        if rank != slow:
            assert waits.index(max(waits)) == slow
            assert waits[slow] > 150_000


ASCEND_CASES = {
    "even": ([16, 16, 16, 16], 4, 0.0),
    "dropped choices": ([15, 16, 17, 14], 4, 0.3),
    "idle ranks": ([16, 0, 9, 16], 2, 0.0),
    "nobody": ([0, 0, 0, 0], 4, 0.0),
}


@pytest.mark.parametrize("case", ASCEND_CASES)
def test_deep_ep_ascends_test_shape(pool: Pool, case: str) -> None:
    """Two arguments of the constructor are all that was added."""
    num_tokens, num_active, drop = ASCEND_CASES[case]
    reports = pool.run(ascend_program.run, num_tokens, 256, num_active, drop)
    assert [num_rounds for num_rounds, _ in reports] == [16] * 4


def ship_bytes(group: dist.ProcessGroup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in a format of the client's own, shown to the library as bf16: what each expert got."""
    x = own_tokens(group.rank())
    data, scales = per_token_cast_to_fp8(x)
    shipped = torch.cat([data.view(torch.uint8), scales.view(torch.uint8)], dim=1)
    topk_idx = torch.arange(len(x))[:, None] % group.size()
    with deep_ep.Buffer(group, low_latency_mode=True) as buffer:
        slabs, counts, handle, _, _ = buffer.low_latency_dispatch(
            shipped.view(torch.bfloat16), topk_idx, len(x), group.size(), use_fp8=False
        )
        raw = slabs[0, : int(counts[0])].contiguous().view(torch.uint8)
    tokens = handle[0][0, : int(counts[0])]
    payload, own_scales = raw[:, : x.size(1)], raw[:, x.size(1) :]
    rows = payload.contiguous().view(torch.float8_e4m3fn)
    return per_token_cast_back(rows, own_scales.contiguous().view(torch.float32)), tokens


def own_tokens(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn((10, 256), generator=generator, dtype=torch.float32).bfloat16()


def test_bytes_of_the_clients_own_travel_as_bf16(pool: Pool) -> None:
    """fp8 bytes read as bf16 hold every pattern, NaN among them: none of them may change."""
    sent = [per_token_cast_back(*per_token_cast_to_fp8(own_tokens(rank))) for rank in range(4)]
    for rank, (rows, tokens) in enumerate(pool.run(ship_bytes)):
        chosen = torch.arange(10)[rank::4]
        assert torch.equal(tokens.long(), chosen.repeat(4))
        assert torch.equal(rows, torch.cat([x[chosen] for x in sent]))
