"""A kernel that asks whether it may write, for `test_device_rounds`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from crossdock.device.launch import Kernel
from crossdock.ops.triton.links import Address, Group, Link, heap_of, words_at
from crossdock.ops.triton.sync import has_credit, look_for_credit

CREDITS = 128
"""Offset in the heap, behind the words to watch."""


class Asked(NamedTuple):
    """For which round, and where the answer goes."""

    found: Address
    number: int


@triton.jit
def ask(asked, link, G: tl.constexpr):
    own = heap_of(link, link.rank)
    seen = look_for_credit(own, link.kind, link, G)
    granted = has_credit(seen, own, link.kind, asked.number, link, 1, G)
    tl.store(words_at(asked.found, 4), granted.to(tl.int32))


def may_write(number: int, behind: list[int]) -> tuple[bool, list[int]]:
    """Whether a rank may in a round, given the rounds that ranks have behind them; who is late."""
    num_ranks = len(behind)
    heap, report = torch.zeros(32, dtype=torch.int64), torch.zeros(num_ranks + 1).long()
    heap[1] = report.data_ptr()
    words = heap.view(torch.int32)[CREDITS // 4 :]
    words[:num_ranks] = torch.tensor(behind, dtype=torch.int32)
    peers, found = torch.full((num_ranks,), heap.data_ptr()), torch.full((1,), -1).int()
    group = Group(num_ranks, triton.next_power_of_2(num_ranks), 1, is_compiled=False)
    link = Link(peers.data_ptr(), 0, CREDITS, rank=0, kind=0, deadline=3)
    Kernel(ask, group, num_warps=1).launch(1, (Asked(found.data_ptr(), number), link))
    return bool(found.item()), report[:-1].nonzero().flatten().tolist()
