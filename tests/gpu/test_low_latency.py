"""Low-latency calls on CUDA tensors over the collective transport, one GPU a rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crossdock import Buffer, worlds
from crossdock import reference_low_latency as oracle
from crossdock.cases import ROUTING_CASES
from crossdock.reference import calc_diff
from tests.gpu.test_collective import on_gpu

NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 GPUs, this machine has {NUM_GPUS}")

SLOTS, HIDDEN = 64, 512
FORMATS = {
    "bf16": {"use_fp8": False},
    "fp8": {},
    "fp8_round_scale": {"round_scale": True},
    "fp8_ue8m0": {"round_scale": True, "use_ue8m0": True},
}


def compare(rank: int, num_ranks: int) -> dict[str, str]:
    """Case -> what is wrong on this rank."""
    wrong = {}
    group = on_gpu(rank)
    with Buffer(group, transport="collective", low_latency_mode=True, timeout_s=60) as buffer:
        for name, case in ROUTING_CASES.items():
            for form, switches in FORMATS.items():
                problem = one_case(buffer, case.make(num_ranks, seed=2), form, switches)
                if problem:
                    wrong[f"{name} {form}"] = problem
    with Buffer(
        group, transport="collective", low_latency_format="int8", low_latency_rows="compact"
    ) as buffer:
        routing = ROUTING_CASES["duplicates"].make(num_ranks, seed=2)
        problem = one_case(buffer, routing, "int8", {})
        if problem:
            wrong["compact int8"] = problem
    return wrong


def one_case(buffer: Buffer, routing: Any, form: str, switches: dict[str, bool]) -> str:
    rank, (idxs, num_experts) = buffer.rank, routing
    generator = torch.Generator().manual_seed(3)
    xs = [torch.randn(len(idx), HIDDEN, generator=generator).bfloat16() for idx in idxs]
    weights = [torch.rand(idx.shape, generator=generator) for idx in idxs]
    right = oracle.dispatch(xs, idxs, num_experts=num_experts, format=form)
    x, idx, weight = (each[rank].cuda() for each in (xs, idxs, weights))
    recv, count, handle, _, hook = buffer.low_latency_dispatch(
        x, idx, SLOTS, num_experts, return_recv_hook=True, **switches
    )
    hook()
    rows, scales = recv if isinstance(recv, tuple) else (recv, None)
    num = right[rank].recv_count
    faults = [] if count.tolist() == num else ["counts"]
    begins = [0 if rows.dim() == 3 else sum(num[:expert]) for expert in range(len(num))]
    for expert, (begin, length) in enumerate(zip(begins, num, strict=True)):
        here = slice(begin, begin + length)
        mine = (rows[expert] if rows.dim() == 3 else rows)[here]
        if not same_bytes(mine, right[rank].rows[expert]):
            faults.append(f"rows of expert {expert}")
        if scales is not None:
            mine = (scales[expert] if rows.dim() == 3 else scales)[here]
            if not same_bytes(mine, right[rank].scales[expert]):
                faults.append(f"scales of expert {expert}")
    answers = torch.full(rows.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    made = [
        [torch.randn(length, HIDDEN, generator=generator).bfloat16() for length in each.recv_count]
        for each in right
    ]
    for expert, (begin, length) in enumerate(zip(begins, num, strict=True)):
        area = answers[expert] if rows.dim() == 3 else answers
        area[begin : begin + length] = made[rank][expert].cuda()
    combined, _, hook = buffer.low_latency_combine(
        answers, idx, weight, handle, return_recv_hook=True
    )
    hook()
    sums = oracle.combine(made, idxs, weights, num_experts=num_experts)[rank].combined
    if not combined.is_cuda or not calc_diff(combined.cpu(), sums) < 1e-5:
        faults.append("sums")
    return ", ".join(faults)


def same_bytes(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    def as_bytes(rows: torch.Tensor) -> torch.Tensor:
        return rows.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8)

    if not wanted.numel():
        return not got.numel()
    return got.dtype == wanted.dtype and torch.equal(as_bytes(got), as_bytes(wanted))


@pytest.mark.parametrize("num_ranks", sorted({2, NUM_GPUS}))
def test_results_are_those_of_the_oracle(num_ranks: int) -> None:
    assert worlds.spawn(compare, num_ranks, timeout_s=110) == [{}] * num_ranks
