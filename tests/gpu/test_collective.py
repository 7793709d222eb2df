"""The collective transport on CUDA tensors, over NCCL, one GPU a rank."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock import Buffer, EventHandle, EventOverlap, PeerTimeoutError, reference, worlds
from crossdock.cases import ROUTING_CASES, origin_rows

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs, this machine has {NUM_GPUS}")


def on_gpu(rank: int) -> dist.ProcessGroup:
    torch.cuda.set_device(rank)
    return dist.new_group(backend="nccl")


def compare(rank: int, num_ranks: int) -> dict[str, str]:
    """Case -> what is wrong on this rank."""
    buffer = Buffer(on_gpu(rank), transport="collective", timeout_s=60, first_call_timeout_s=60)
    wrong = {"transport": buffer.transport} if buffer.transport != "collective" else {}
    for name, case in ROUTING_CASES.items():
        for dtype in (torch.bfloat16, torch.float32):
            problem = one_case(buffer, case.make(num_ranks, seed=1), dtype)
            if problem:
                wrong[f"{name} {dtype}"] = problem
    return wrong


def one_case(buffer: Buffer, routing: Any, dtype: torch.dtype) -> str:
    rank = buffer.rank
    idxs, num_experts = routing
    xs = [origin_rows(r, len(idx), 136, dtype=dtype) for r, idx in enumerate(idxs)]
    weights = [torch.rand(idx.shape, generator=torch.Generator().manual_seed(1)) for idx in idxs]
    moved = reference.dispatch(xs, idxs, weights, num_experts=num_experts)
    wanted = moved[rank]
    x, idx, weight = (tensors[rank].cuda() for tensors in (xs, idxs, weights))
    previous = EventOverlap(EventHandle())
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts, previous)
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weight,
        async_finish=True,
    )
    event.current_stream_wait()
    again, *_ = buffer.dispatch(x, handle=handle)
    rows = [each.recv_x * (r + 1) for r, each in enumerate(moved)]
    sums = reference.combine(rows, idxs, num_experts)[rank].combined
    combined, back, _ = buffer.combine(recv_x * (rank + 1), handle, topk_weights=recv_weights)
    checks = {
        "device": recv_x.is_cuda and combined.is_cuda and recv_idx.is_cuda,
        "rows": torch.equal(recv_x.cpu(), wanted.recv_x) and torch.equal(again, recv_x),
        "choices": torch.equal(recv_idx.cpu(), wanted.recv_topk_idx),
        "weights": torch.equal(recv_weights.cpu(), wanted.recv_topk_weights),
        "counts": counts == wanted.num_recv_tokens_per_expert,
        "prefix": torch.equal(handle[0].cpu(), wanted.rank_prefix_matrix),
        "sums": not sums.numel() or reference.calc_diff(combined.cpu(), sums) < 5e-6,
        "weights back": torch.allclose(back.cpu(), weights[rank] * (idxs[rank] >= 0)),
    }
    return ", ".join(name for name, right in checks.items() if not right)


@pytest.mark.parametrize("num_ranks", sorted({2, NUM_GPUS}))
def test_results_are_those_of_the_oracle(num_ranks: int) -> None:
    assert worlds.spawn(compare, num_ranks, timeout_s=100) == [{}] * num_ranks


def miss_one(rank: int, num_ranks: int) -> tuple[list[int], float, int]:
    buffer = Buffer(on_gpu(rank), transport="collective", timeout_s=3, first_call_timeout_s=30)
    idx = torch.arange(num_ranks, device="cuda").repeat(4, 1)
    began, missing = time.monotonic(), []
    try:
        for round_number in range(4):
            if (rank, round_number) == (1, 2):
                time.sleep(8)
                break
            began = time.monotonic()
            _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_ranks)
            x = torch.ones(4, 8, device="cuda")
            buffer.dispatch(
                x, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, topk_idx=idx
            )
    except PeerTimeoutError as error:
        missing = error.missing
    return missing, time.monotonic() - began, 0


def test_a_missing_rank_is_named() -> None:
    results = worlds.spawn(miss_one, 2, timeout_s=100)
    missing, waited_s, _ = results[0]
    assert missing == [1]
    assert waited_s < 4.5
