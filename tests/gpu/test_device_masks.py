"""Masks on GPUs: the jobs of the tests of the interpreted kernels."""

from __future__ import annotations

from tests.gpu.adapter import NEEDS_GPUS
from tests.worlds.test_device_masks import (
    test_a_mask_is_never_passed_over,
    test_a_mask_of_one_rank_is_taken_over_by_all,
    test_a_masked_rank_contributes_nothing_and_comes_back,
    test_a_rank_that_missed_calls_can_return,
    test_a_rank_that_returns_before_the_combine_owes_nothing,
    test_what_needs_all_ranks_says_so_and_works_again_afterwards,
    test_who_returns_takes_over_the_masks_of_the_others,
)

__all__ = [
    "test_a_mask_is_never_passed_over",
    "test_a_mask_of_one_rank_is_taken_over_by_all",
    "test_a_masked_rank_contributes_nothing_and_comes_back",
    "test_a_rank_that_missed_calls_can_return",
    "test_a_rank_that_returns_before_the_combine_owes_nothing",
    "test_what_needs_all_ranks_says_so_and_works_again_afterwards",
    "test_who_returns_takes_over_the_masks_of_the_others",
]

pytestmark = NEEDS_GPUS
