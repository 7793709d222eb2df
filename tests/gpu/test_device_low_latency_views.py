"""Low-latency rows that stay where they land, on GPUs: the tests of the interpreted kernels."""

from __future__ import annotations

from tests.gpu.adapter import NEEDS_GPUS
from tests.worlds.test_device_low_latency_views import (
    test_rows_stay_in_other_worlds,
    test_rows_stay_where_they_land_and_come_back,
    test_views_and_slabs_take_turns,
    test_waits_are_counted,
)

__all__ = [
    "test_rows_stay_in_other_worlds",
    "test_rows_stay_where_they_land_and_come_back",
    "test_views_and_slabs_take_turns",
    "test_waits_are_counted",
]

pytestmark = NEEDS_GPUS
