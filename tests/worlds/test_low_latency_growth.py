"""A buffer that grows while low-latency rows are on their way: each lands where it was sent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from crossdock import Buffer, worlds
from crossdock import reference_low_latency as oracle

NUM_RANKS, EXPERTS, HIDDEN = 3, 9, 128


class Batch(NamedTuple):
    """The tokens and choices of every rank."""

    xs: list[torch.Tensor]
    topk_idxs: list[torch.Tensor]


def make_batch(number: int) -> Batch:
    """Each one larger than the one before."""
    generator = torch.Generator().manual_seed(number)
    lengths = [4 * number + 4 + rank for rank in range(NUM_RANKS)]
    return Batch(
        [torch.randn(length, HIDDEN, generator=generator).bfloat16() for length in lengths],
        [torch.randint(-1, EXPERTS, (length, 3), generator=generator) for length in lengths],
    )


def grow(buffer: Buffer, num_tokens: int) -> None:
    """A high-throughput call that is larger than the one before."""
    topk_idx = torch.zeros((num_tokens, 1), dtype=torch.int64)
    layout = buffer.get_dispatch_layout(topk_idx, EXPERTS)
    x = torch.zeros((num_tokens, 256), dtype=torch.bfloat16)
    arguments = {"is_token_in_rank": layout[3], "num_tokens_per_expert": layout[2]}
    buffer.dispatch(x, **arguments, topk_idx=topk_idx)


def go(group: Any) -> tuple[list[str], list[int]]:
    faults, sizes, pending = [], [], []
    with Buffer(group, low_latency_mode=True, transport="one_sided") as buffer:
        for number in range(8):
            batch = make_batch(number)
            x, idx = batch.xs[buffer.rank], batch.topk_idxs[buffer.rank]
            slots = max(len(each) for each in batch.xs)
            rows, count, *_, hook = buffer.low_latency_dispatch(
                x, idx, slots, EXPERTS, use_fp8=False, return_recv_hook=True
            )
            pending.append((number, batch, rows, count, hook))
            grow(buffer, 50 * (number + 1))
            sizes.append(sum(buffer._session.transport.memory().values()))
            if len(pending) == 2:
                late_first = (buffer.rank + number) % 2
                faults += [fault_of(buffer, *each) for each in pending[:: -1 if late_first else 1]]
                pending.clear()
    return [fault for fault in faults if fault], sizes


def fault_of(
    buffer: Buffer, number: int, batch: Batch, rows: torch.Tensor, count: torch.Tensor, hook: Any
) -> str:
    hook()
    right = oracle.dispatch(*batch, num_experts=EXPERTS, format="bf16")[buffer.rank]
    same = count.tolist() == right.recv_count and all(
        torch.equal(rows[expert, : len(wanted)], wanted) for expert, wanted in enumerate(right.rows)
    )
    return "" if same else f"batch {number}"


def test_rows_in_flight_stay_where_they_are_when_the_buffer_grows(pool: worlds.Pool) -> None:
    for faults, sizes in pool.run(go, num_ranks=NUM_RANKS):
        assert faults == []
        assert len(set(sizes)) > 4
        assert sizes == sorted(sizes)
