"""What is said of devices alone, on GPUs: the tests that elsewhere interpret the kernels."""

from __future__ import annotations

from tests.gpu.adapter import NEEDS_GPUS
from tests.worlds.test_device_failures import (
    test_a_rank_that_refuses_is_named_at_once,
    test_every_rank_that_is_missing_is_named_and_no_other,
)
from tests.worlds.test_device_high_throughput import (
    test_the_buffer_grows_with_what_is_asked_of_it,
    test_two_buffers_do_not_disturb_each_other,
)
from tests.worlds.test_device_low_latency import (
    _small_worlds,
    test_all_ways_of_calling_combine_give_the_same,
    test_defaults_strides_and_gradients_of_the_caller_do_not_matter,
    test_rows_are_counted_by_the_hook,
    test_weights_may_come_early_and_sums_are_rounded_as_asked,
)

__all__ = [
    "_small_worlds",
    "test_a_rank_that_refuses_is_named_at_once",
    "test_all_ways_of_calling_combine_give_the_same",
    "test_defaults_strides_and_gradients_of_the_caller_do_not_matter",
    "test_every_rank_that_is_missing_is_named_and_no_other",
    "test_rows_are_counted_by_the_hook",
    "test_the_buffer_grows_with_what_is_asked_of_it",
    "test_two_buffers_do_not_disturb_each_other",
    "test_weights_may_come_early_and_sums_are_rounded_as_asked",
]

pytestmark = NEEDS_GPUS
