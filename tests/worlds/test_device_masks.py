"""Masks where kernels, interpreted, move the rows: the jobs of the tests of shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from tests.worlds import test_masks as masks
from tests.worlds.device_worlds import InterpretedPool

PATIENCE = {"timeout_s": 20.0, "first_call_timeout_s": 60.0}
"""No deadline may pass because an interpreter is slow."""


def on_device(
    group: Any, job: Callable[..., Any], *args: Any, patience: dict[str, float] | None = None
) -> Any:
    """Do a job with buffers whose kernels move the rows."""
    usual = masks.open_buffer

    def open_buffer(group: Any, **options: Any) -> Any:
        return usual(group, **{**options, **(patience or {}), "transport": "device"})

    with mock.patch.object(masks, "open_buffer", open_buffer):
        return job(group, *args)


def patiently(group: Any, job: Callable[..., Any], *args: Any) -> Any:
    return on_device(group, job, *args, patience=PATIENCE)


def run(pool: InterpretedPool, num_ranks: int, *job: Any, how: Any = patiently) -> list[Any]:
    return pool.run(how, *job, num_ranks=num_ranks, timeout_s=150.0)


@pytest.mark.parametrize("job", [masks.mask_and_unmask, masks.mask_and_unmask_views])
def test_a_masked_rank_contributes_nothing_and_comes_back(interpreted_pool, job):
    assert run(interpreted_pool, 4, job) == [[]] * 4


def test_a_mask_of_one_rank_is_taken_over_by_all(interpreted_pool):
    assert run(interpreted_pool, 4, masks.mask_on_one_rank) == [([], [0, 0, 1, 0])] * 4


def test_a_mask_is_never_passed_over(interpreted_pool):
    assert run(interpreted_pool, 3, masks.mask_again_and_again) == [[]] * 3


@pytest.mark.parametrize("bring_weights", [False, True])
def test_a_rank_that_returns_before_the_combine_owes_nothing(interpreted_pool, bring_weights):
    """Other than in shared memory, whoever was there in the dispatch is asked for its sums."""
    results = run(interpreted_pool, 3, masks.leave_between_dispatch_and_combine, bring_weights)
    assert results[0] == results[1] == [2.0, 2.0, 3.0, 3.0]
    assert results[masks.VICTIM] == [0.0, 0.0, 3.0, 3.0]


def test_one_rank_does_not_go_on_without_all_others(interpreted_pool):
    results = run(interpreted_pool, 4, masks.come_early, how=on_device)
    assert results == [(4, [0, 0, 0, 0])] * 4


def test_who_returns_takes_over_the_masks_of_the_others(interpreted_pool):
    results = run(interpreted_pool, 4, masks.come_back_one_by_one)
    status = [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    for rank in (0, 1):
        assert results[rank] == list(zip([3, 2, 3, 4], status, strict=True))
    assert results[3][2:] == [(3, status[2]), (4, status[3])]
    assert results[2][3] == (4, status[3])


def test_what_needs_all_ranks_says_so_and_works_again_afterwards(interpreted_pool):
    for found in run(interpreted_pool, 4, masks.shrink_and_do_what_is_not_possible):
        assert "needs all ranks, but [2] are masked" in found[0]
        assert found[1:] == ["BufferTooSmallError", ""]


def test_a_high_throughput_call_does_not_shrink(interpreted_pool):
    assert run(interpreted_pool, 2, masks.time_out, how=on_device) == [[1], [1]]


def miss_two_calls(group: Any) -> list[Any]:
    """One rank makes none of the calls while it is masked, then all count on it again."""
    found = []
    with masks.open_buffer(group) as buffer:
        masks.dispatch_ones(buffer)
        for _ in range(2):
            buffer.low_latency_update_mask_buffer(masks.VICTIM, True)
            if buffer.rank != masks.VICTIM:
                for _ in range(3):
                    masks.dispatch_ones(buffer)
            masks.dist.barrier(group)
            buffer.low_latency_clean_mask_buffer()
            found.append((masks.dispatch_ones(buffer), masks.masked(buffer)))
            masks.dist.barrier(group)
    return found


def test_a_rank_that_missed_calls_can_return(interpreted_pool):
    assert run(interpreted_pool, 3, miss_two_calls) == [[(3, [0, 0, 0])] * 2] * 3
