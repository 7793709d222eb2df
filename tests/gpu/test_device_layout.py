"""Where tokens go, counted on GPUs: the tests of the interpreted kernel."""

from __future__ import annotations

from tests.gpu.adapter import NEEDS_GPUS
from tests.worlds.test_device_layout import (
    test_a_wrong_count_would_be_found,
    test_all_cases_are_counted,
    test_several_programs_add_up,
)

__all__ = [
    "test_a_wrong_count_would_be_found",
    "test_all_cases_are_counted",
    "test_several_programs_add_up",
]

pytestmark = NEEDS_GPUS
