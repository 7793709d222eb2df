"""A training framework's use of DeepEP: autograd functions that are each other's backward.

One buffer a process is kept and replaced when the hints ask for more. Dispatch's backward is a
combine with the weights' gradients; combine's backward is a cached dispatch with a handle that went
through `save_for_backward` and came back as a plain tuple. Nothing here knows crossdock.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import deep_ep
from deep_ep.utils import EventHandle, EventOverlap

_kept: dict[str, deep_ep.Buffer] = {}


def get_hidden_bytes(x: torch.Tensor) -> int:
    return x.size(1) * max(x.element_size(), 2)


def get_buffer(group: dist.ProcessGroup, hidden_bytes: int) -> deep_ep.Buffer:
    num_nvl_bytes, num_rdma_bytes = 0, 0
    for config in (
        deep_ep.Buffer.get_dispatch_config(group.size()),
        deep_ep.Buffer.get_combine_config(group.size()),
    ):
        nvl = config.get_nvl_buffer_size_hint(hidden_bytes, group.size())
        rdma = config.get_rdma_buffer_size_hint(hidden_bytes, group.size())
        num_nvl_bytes, num_rdma_bytes = max(nvl, num_nvl_bytes), max(rdma, num_rdma_bytes)
    kept = _kept.get("buffer")
    if (
        kept is None
        or kept.group != group
        or kept.num_nvl_bytes < num_nvl_bytes
        or kept.num_rdma_bytes < num_rdma_bytes
    ):
        _kept["buffer"] = deep_ep.Buffer(group, num_nvl_bytes, num_rdma_bytes)
    return _kept["buffer"]


def make_events(use_async: bool) -> dict[str, Any]:
    """Arguments of an operation that runs beside the caller's stream, or does not."""
    previous_event = EventOverlap(EventHandle()) if use_async else None
    return {
        "previous_event": previous_event,
        "async_finish": use_async,
        "allocate_on_comm_stream": use_async,
    }


class FusedDispatch(torch.autograd.Function):
    """x, choices and probabilities to where the experts are."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any):
        x, topk_idx, probs, num_experts, group, use_async = inputs
        buffer = get_buffer(group, get_hidden_bytes(x))
        events = make_events(use_async)
        per_rank, per_domain, per_expert, is_token_in_rank, event = buffer.get_dispatch_layout(
            topk_idx, num_experts, **events
        )
        recv_x, recv_idx, recv_probs, counts, handle, done = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_domain,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            **{**events, "previous_event": event if use_async else None},
        )
        if use_async:
            done.current_stream_wait()
        ctx.group, ctx.handle, ctx.use_async = group, handle, use_async
        ctx.mark_non_differentiable(recv_idx)
        return recv_x, recv_idx, recv_probs, torch.tensor(counts, dtype=torch.int64), handle

    @staticmethod
    def backward(ctx: Any, grad_x, _idx, grad_probs, _counts, _handle):
        buffer = get_buffer(ctx.group, get_hidden_bytes(grad_x))
        grad_x, grad_probs, done = buffer.combine(
            grad_x.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            **make_events(ctx.use_async),
        )
        if ctx.use_async:
            done.current_stream_wait()
        return grad_x, None, grad_probs, None, None, None


class FusedCombine(torch.autograd.Function):
    """The experts' rows back to their tokens, summed."""

    @staticmethod
    def forward(ctx: Any, x, group, handle, use_async):
        buffer = get_buffer(group, get_hidden_bytes(x))
        combined, _, done = buffer.combine(x, handle=handle, **make_events(use_async))
        if use_async:
            done.current_stream_wait()
        ctx.group, ctx.use_async = group, use_async
        ctx.save_for_backward(*handle)
        return combined

    @staticmethod
    def backward(ctx: Any, grad):
        buffer = get_buffer(ctx.group, get_hidden_bytes(grad))
        handle = tuple(ctx.saved_tensors)
        grad_x, _, _, _, _, done = buffer.dispatch(
            grad.contiguous(), handle=handle, **make_events(ctx.use_async)
        )
        if ctx.use_async:
            done.current_stream_wait()
        return grad_x, None, None, None


def moe_layer(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    probs: torch.Tensor,
    *,
    scales: torch.Tensor,
    group: dist.ProcessGroup,
    use_async: bool,
) -> torch.Tensor:
    """`y[t] = sum_k probs[t, k] * scales[topk_idx[t, k]] * x[t]`, experts spread over the ranks.

    Args:
        x: `[T, H]`.
        topk_idx: `[T, K]` int64, -1 = none.
        probs: `[T, K]` float32.
        scales: `[E]`, what each expert multiplies by.
        group: The ranks.
        use_async: Whether to go through events.
    """
    num_local = len(scales) // group.size()
    mine = scales[group.rank() * num_local :][:num_local]
    recv_x, recv_idx, recv_probs, counts, handle = FusedDispatch.apply(
        x, topk_idx, probs, len(scales), group, use_async
    )
    selected = recv_idx >= 0
    assert counts.tolist() == [int((recv_idx == expert).sum()) for expert in range(num_local)]
    factors = mine[recv_idx.clamp(min=0)] * recv_probs * selected
    rows = (recv_x.float() * factors.sum(dim=1, keepdim=True)).to(recv_x.dtype)
    return FusedCombine.apply(rows, group, handle, use_async)
