"""High-throughput calls on GPUs: all tests of the other transports; kernels move the rows."""

from __future__ import annotations

from types import FunctionType

from tests.gpu.adapter import NEEDS_GPUS, on_device
from tests.worlds import test_high_throughput as world
from tests.worlds.test_device_high_throughput import test_knobs_change_no_result

__all__ = ["test_knobs_change_no_result"]

pytestmark = NEEDS_GPUS

test_rows_arrive_and_come_back = on_device(world.test_rows_arrive_and_come_back)
test_padded_results_begin_like_exact_ones = on_device(
    world.test_padded_results_begin_like_exact_ones
)
test_rows_that_do_not_fit_are_dropped_in_sight = on_device(
    world.test_rows_that_do_not_fit_are_dropped_in_sight, num_ranks=[1, 2, 4]
)
test_biases_are_added_before_the_one_rounding = on_device(
    world.test_biases_are_added_before_the_one_rounding
)
test_experts_weights_and_alignment_are_optional = on_device(
    world.test_experts_weights_and_alignment_are_optional
)
test_presence_decides_what_travels = on_device(world.test_presence_decides_what_travels)
test_results_outlive_later_calls_and_the_buffer = on_device(
    world.test_results_outlive_later_calls_and_the_buffer
)
test_sums_are_taken_in_float32_in_rank_order = on_device(
    world.test_sums_are_taken_in_float32_in_rank_order
)
test_wide_rows_and_many_choices = on_device(world.test_wide_rows_and_many_choices)
test_defaults_of_the_caller_do_not_matter = on_device(
    world.test_defaults_of_the_caller_do_not_matter
)
test_strides_and_gradients_do_not_matter = on_device(world.test_strides_and_gradients_do_not_matter)


def test_no_test_is_left_out() -> None:
    there = {
        name
        for name, value in vars(world).items()
        if name.startswith("test_")
        and isinstance(value, FunctionType)
        and "transport" in value.__code__.co_varnames
    }
    assert there <= set(globals())
