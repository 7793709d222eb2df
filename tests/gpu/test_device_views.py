"""Rows that stay where they land, on GPUs: the tests of the other transports."""

from __future__ import annotations

from tests.gpu.adapter import NEEDS_GPUS, on_device
from tests.worlds import test_views as world
from tests.worlds.test_views import test_kernels_leave_rows_where_they_land

__all__ = ["test_kernels_leave_rows_where_they_land"]

pytestmark = NEEDS_GPUS

test_views_hold_what_a_dispatch_brings = on_device(world.test_views_hold_what_a_dispatch_brings)
