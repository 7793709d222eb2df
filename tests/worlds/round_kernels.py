"""Kernels that ask whether they may write, and whether all has come, for `test_device_rounds`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from crossdock.device.launch import Kernel
from crossdock.ops.triton.links import MASKED, Address, Group, Link, heap_of, words_at
from crossdock.ops.triton.sync import has_credit, look_for_credit, wait_singled

WRITTEN = 128
"""Offset in the heap of what others write to it, behind the words to watch."""


class Asked(NamedTuple):
    """For which round, and where the answer goes."""

    found: Address
    number: int


class Answer(NamedTuple):
    """What a kernel found, who it reports as late, and who is masked after it."""

    found: int
    late: list[int]
    masked: list[int]


@triton.jit
def ask_for_credit(asked, link, G: tl.constexpr):
    own = heap_of(link, link.rank)
    seen = look_for_credit(own, link.kind, link, G)
    granted = has_credit(seen, own, link.kind, asked.number, link, 1, G)
    tl.store(words_at(asked.found, 4), granted.to(tl.int32))


@triton.jit
def ask_for_words(asked, link, G: tl.constexpr):
    rank = tl.arange(0, G.padded)
    words = words_at(heap_of(link, link.rank) + link.credits, 8) + rank
    data, come = wait_singled(words, rank < G.size, rank, asked.number, link, 1, G)
    tl.store(words_at(asked.found, 4), tl.where(come, tl.sum(data), -1))


def may_write(number: int, behind: Sequence[int], masked: Collection[int] | None = None) -> Answer:
    """Whether rank 0 may in a round, given the rounds that ranks have behind them.

    Args:
        number: of the round.
        behind: of each rank.
        masked: ranks that are gone on without; None where no rank may be.
    """
    return _answer(ask_for_credit, number, torch.tensor(behind, dtype=torch.int32), masked)


def all_come(number: int, rounds: Sequence[int], masked: Collection[int] | None = None) -> Answer:
    """The sum of what each rank has written in a round, 1 to R, or -1 if not all of it has come."""
    words = [(rank + 1) << 32 | round_ & 0xFFFFFFFF for rank, round_ in enumerate(rounds)]
    return _answer(ask_for_words, number, torch.tensor(words), masked)


def _answer(
    kernel: Any, number: int, written: torch.Tensor, masked: Collection[int] | None
) -> Answer:
    num_ranks = len(written)
    heap, report = torch.zeros(64, dtype=torch.int64), torch.zeros(num_ranks + 1).long()
    heap[1] = report.data_ptr()
    masks = heap[MASKED.value : MASKED.value + num_ranks]
    masks[list(masked or ())] = 1
    heap.view(written.dtype)[WRITTEN // written.itemsize :][:num_ranks] = written
    peers, found = torch.full((num_ranks,), heap.data_ptr()), torch.full((1,), -9).int()
    group = Group(
        num_ranks,
        triton.next_power_of_2(num_ranks),
        1,
        is_compiled=False,
        can_shrink=masked is not None,
    )
    link = Link(peers.data_ptr(), 0, WRITTEN, rank=0, kind=0, deadline=3)
    Kernel(kernel, group, num_warps=1).launch(1, (Asked(found.data_ptr(), number), link))
    late = report[:-1].nonzero().flatten().tolist()
    return Answer(int(found), late, masks.nonzero().flatten().tolist())
