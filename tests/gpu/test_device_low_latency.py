"""Low-latency calls on GPUs: the tests of the other transports; kernels move the rows."""

from __future__ import annotations

from types import FunctionType, MappingProxyType

import pytest

from tests.gpu.adapter import NEEDS_GPUS, on_device
from tests.worlds import test_device_low_latency as device
from tests.worlds import test_low_latency as world
from tests.worlds import test_low_latency_calls as calls

pytestmark = NEEDS_GPUS

LEFT_OUT = MappingProxyType(
    {
        "test_weights_may_come_early_and_sums_are_rounded_as_asked": "in `test_device_small`",
        "test_all_ways_of_calling_combine_give_the_same": "a device knows no copied handle; there",
        "test_rows_are_received_and_counted_by_the_hook": "nothing is zero before it; there",
    }
)
"""Tests that ask for what devices do not do, and where there is another one."""


@pytest.fixture(autouse=True)
def _device_is_a_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "TRANSPORTS", [*world.TRANSPORTS, "device"])


test_rows_arrive_and_come_back = on_device(world.test_rows_arrive_and_come_back)
test_all_widths_and_numbers_of_choices = on_device(world.test_all_widths_and_numbers_of_choices)
test_what_cannot_be_encoded_arrives_as_documented = on_device(
    world.test_what_cannot_be_encoded_arrives_as_documented
)
test_partial_sums_are_rounded_as_asked = on_device(world.test_partial_sums_are_rounded_as_asked)
test_defaults_strides_and_gradients_of_the_caller_do_not_matter = on_device(
    calls.test_defaults_strides_and_gradients_of_the_caller_do_not_matter
)
test_a_late_rank_is_waited_for_and_waits_for_nobody = on_device(
    calls.test_a_late_rank_is_waited_for_and_waits_for_nobody
)
test_sums_are_taken_by_slot_and_then_by_rank = on_device(
    world.test_sums_are_taken_by_slot_and_then_by_rank
)
test_without_use_fp8_its_switches_say_nothing = on_device(
    calls.test_without_use_fp8_its_switches_say_nothing
)
test_two_batches_pass_through_each_other = on_device(calls.test_two_batches_pass_through_each_other)
test_a_thread_receives_while_another_sends = on_device(
    calls.test_a_thread_receives_while_another_sends
)
test_every_call_may_have_its_own_number_of_slots = on_device(
    calls.test_every_call_may_have_its_own_number_of_slots
)


def test_no_test_is_left_out() -> None:
    there = {
        name
        for module in (world, calls)
        for name, value in vars(module).items()
        if isinstance(value, FunctionType)
        and name.startswith("test_")
        and "transport" in value.__code__.co_varnames
    }
    assert there <= set(globals()) | set(LEFT_OUT)
    assert set(vars(device)) >= {name for name in LEFT_OUT if "early" in name}
