"""How a heap is divided."""

from __future__ import annotations

import gc

import pytest
import torch

from crossdock import Buffer
from crossdock.config import NUM_LANDING_ZONES, low_latency_size_hint
from crossdock.transports.header import Header
from crossdock.transports.heap_shm import Segment, ShmHeap
from crossdock.transports.zones import Capacity, Generation


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("num_slots", "hidden"), [(1, 32), (128, 7168), (77, 2560), (512, 32)])
def test_a_buffer_of_the_hinted_size_does_not_grow(
    num_ranks: int, num_slots: int, hidden: int
) -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(num_slots, hidden, num_ranks, 8 * num_ranks)
    assert hint == low_latency_size_hint(num_slots, hidden, num_ranks)
    have = Capacity.of_bytes(num_ranks, 0, hint)
    call = Header(num_slots=num_slots, num_topk=22, row_bytes=hidden, return_bytes=2 * hidden)
    assert have.covering([call] * num_ranks) is have
    assert have.nbytes <= hint


def test_low_latency_calls_need_no_zones_and_others_no_landing_zones() -> None:
    call = Header(num_tokens=5, num_slots=16, row_bytes=64, return_bytes=128, num_topk=4)
    needed = Capacity(2).covering([call])
    assert needed.zone_bytes == 0
    assert needed.region_bytes >= 16 * 128
    assert needed.share_bytes >= 16 * 4 * 8
    needed = Capacity(2).covering([call._replace(num_slots=0)])
    assert needed.region_bytes == 0
    assert needed.zone_bytes >= 2 * 5 * 128


def test_regions_of_a_heap_do_not_meet() -> None:
    capacity = Capacity(3, share_bytes=64, zone_bytes=4096, region_bytes=4096)
    segment = Segment(capacity.nbytes)
    heap = ShmHeap(segment, [segment.address] * 3)
    generation = Generation(heap, capacity, 0)
    heap.peer(0).zero_()
    for zone in range(NUM_LANDING_ZONES):
        for src in range(3):
            region = generation.region(0, zone, src=src)
            assert not region.any()
            region.fill_(1)
    assert int(generation.zones().sum()) == NUM_LANDING_ZONES * 3 * 4096
    assert not generation.zone(0, 3).any()


def test_a_landing_zone_is_free_when_nobody_looks_at_it() -> None:
    capacity = Capacity(2, region_bytes=4096)
    segment = Segment(capacity.nbytes)
    generation = Generation(ShmHeap(segment, [segment.address] * 2), capacity, 0)
    lent = generation.lend_landing(generation.free_landing[-1])
    part = lent[8:12].view(torch.int32)
    assert len(generation.free_landing) == NUM_LANDING_ZONES - 1
    del lent
    gc.collect()
    assert len(generation.free_landing) == NUM_LANDING_ZONES - 1
    del part
    gc.collect()
    assert len(generation.free_landing) == NUM_LANDING_ZONES
