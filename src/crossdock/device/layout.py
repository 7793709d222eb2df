"""Counting where tokens go, in one kernel: `routing.dispatch_layout` on a device.

T tokens here, K top-k, E experts, R ranks.
"""

from __future__ import annotations

import functools

import torch

from crossdock.device.constants import next_power_of_two
from crossdock.device.launch import Kernel
from crossdock.ops.triton import rank_layouts
from crossdock.routing import DispatchLayout, check_expert_ids
from crossdock.topology import num_local_experts

__all__ = ["device_layout", "layout_kernel"]

_CHOICES_AT_ONCE = 4096
_NUM_WARPS = 8


def device_layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> DispatchLayout:
    """What `dispatch_layout` says, without waiting for the device.

    Args:
        topk_idx: [T, K] int64 expert ids; -1 selects nothing, and so does what is not below E.
        num_experts: E.
        num_ranks: R.

    Raises:
        ShapeError: the experts do not divide over the ranks.
    """
    num_local_experts(num_experts, num_ranks)
    check_expert_ids(topk_idx, num_experts)
    idx, device = topk_idx.contiguous(), topk_idx.device
    num_tokens, num_topk = idx.shape
    counts = torch.zeros((num_ranks + num_experts,), dtype=torch.int32, device=device)
    in_rank = torch.empty((num_tokens, num_ranks), dtype=torch.bool, device=device)
    per_rank, per_expert = counts[:num_ranks], counts[num_ranks:]
    kernel, tokens = layout_kernel(num_topk, num_experts, num_ranks)
    if num_tokens and num_topk:
        of = rank_layouts.LayoutOf(
            idx.data_ptr(),
            per_rank.data_ptr(),
            per_expert.data_ptr(),
            in_rank.data_ptr(),
            num_tokens,
        )
        kernel.launch(-(-num_tokens // tokens), (of,))
    else:
        in_rank.zero_()
    return DispatchLayout(per_rank, per_expert, in_rank)


@functools.cache
def layout_kernel(num_topk: int, num_experts: int, num_ranks: int) -> tuple[Kernel, int]:
    """The kernel, and the tokens of one of its programs."""
    topk = next_power_of_two(max(num_topk, 1))
    ranks = next_power_of_two(num_ranks)
    tokens = max(_CHOICES_AT_ONCE // max(topk, ranks), 1)
    choices = rank_layouts.Choices(
        num_topk,
        topk,
        num_experts,
        next_power_of_two(num_experts + 1),
        num_experts // num_ranks,
        num_ranks,
        ranks,
        tokens,
    )
    return Kernel(rank_layouts.lay_out_tokens, choices, num_warps=_NUM_WARPS), tokens
