"""Dispatch and combine as differentiable operations: each is the other's backward.

`Buffer` moves bytes and knows no gradients. Here its calls become operations of `torch.library`,
with fake kernels and backward formulas, so that autograd, activation checkpointing and
`torch.compile` can see through them. What the experts do in between is left to the caller.

    operation   forward                     gradients
    dispatch    buffer.dispatch             combine, of the rows' and the weights' gradients
    resend      buffer.dispatch(handle=)    combine
    combine     buffer.combine              resend, of the rows' and the weights' gradients

Backward communicates, so every rank must take part in it: also one that has no tokens, received
nothing, or whose experts ignored what they received. Two things see to that: tensors without rows
always enter the graph, and an empty tensor (the tie) runs from dispatch to combine beside the rows.

Symbols: T tokens here, K top-k, H hidden, N received rows, R ranks, E experts, L = E / R.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from crossdock.buffer import Buffer
from crossdock.errors import HandleError
from crossdock.handle import Handle

__all__ = ["DispatchedTokens", "GraphHandle", "buffer_key", "combine", "dispatch"]


class GraphHandle(NamedTuple):
    """A `Handle` inside a graph: its six tensors, then the tie. A `Buffer` takes `handle[:6]`.

    Attributes:
        tie: [0] float32. Carries no value; the gradient that passes through it makes dispatch's
            backward follow combine's on every rank.
    """

    rank_prefix_matrix: Tensor
    channel_prefix_matrix: Tensor
    recv_channel_prefix_matrix: Tensor
    recv_src_idx: Tensor
    is_token_in_rank: Tensor
    send_head: Tensor
    tie: Tensor


class DispatchedTokens(NamedTuple):
    """What this rank received.

    Attributes:
        x: [N, H] rows, by source rank, then token.
        topk_idx: [N, K] int64, local expert index, -1 where the slot belongs to another rank.
        topk_weights: [N, K] float32, 0 where the slot belongs to another rank.
        num_tokens_per_expert: [L] int64 on the CPU, rows of each local expert.
        handle: for `combine`.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    num_tokens_per_expert: Tensor
    handle: GraphHandle


def dispatch(
    x: Tensor, buffer: Buffer | int, *, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
) -> DispatchedTokens:
    """Send every token to the ranks of its experts; differentiable in `x` and `topk_weights`.

    Args:
        x: [T, H] bfloat16, float16 or float32.
        buffer: the buffer, or its `buffer_key`, which `torch.compile` can trace without a break.
        topk_idx: [T, K] int64, global expert ids, -1 for none.
        topk_weights: [T, K], converted to float32.
        num_experts: E, a multiple of R.

    **Collective**: all ranks of the buffer, in the same order as its other calls; so is backward.
    **Sync**: the host waits for the counts, in forward only.
    **Lifetime**: the results are the caller's. The buffer must outlive backward.

    Raises:
        HandleError: the buffer of this key is gone.
    """
    recv_x, recv_topk_idx, recv_topk_weights, num_rows, *six_and_tie = _dispatch(
        _in_graph(x).contiguous(),
        topk_idx.contiguous(),
        topk_weights.float().contiguous(),
        num_experts=num_experts,
        key=buffer_key(buffer),
    )
    handle = GraphHandle(*six_and_tie)
    return DispatchedTokens(recv_x, recv_topk_idx, recv_topk_weights, num_rows, handle)


@overload
def combine(
    x: Tensor, buffer: Buffer | int, *, handle: Sequence[Tensor], topk_weights: None = None
) -> Tensor: ...
@overload
def combine(
    x: Tensor, buffer: Buffer | int, *, handle: Sequence[Tensor], topk_weights: Tensor
) -> tuple[Tensor, Tensor]: ...
def combine(
    x: Tensor,
    buffer: Buffer | int,
    *,
    handle: Sequence[Tensor],
    topk_weights: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bring the experts' rows back and add them up; differentiable in `x` and `topk_weights`.

    Args:
        x: [N, H], one row for each that `dispatch` returned, already weighted.
        buffer: as for `dispatch`.
        handle: of that dispatch; a bare handle of `Buffer.dispatch` will do too.
        topk_weights: [N, K], brought back beside the rows. All ranks pass them or none.

    Returns:
        [T, H] in the dtype of `x`; with `topk_weights` also their sums, [T, K] float32.

    **Collective**: all ranks of the buffer, in the same order as its other calls; so is backward.
    **Sync**: none on the device.
    **Lifetime**: the results are the caller's. The buffer must outlive backward.

    Raises:
        HandleError: the handle is not one of this buffer, or the buffer of this key is gone.
    """
    weights = None if topk_weights is None else topk_weights.float().contiguous()
    combined, combined_weights = _combine(
        _in_graph(x).contiguous(), weights, list(handle), key=buffer_key(buffer)
    )
    return combined if topk_weights is None else (combined, combined_weights)


def buffer_key(buffer: Buffer | int) -> int:
    """The number that stands for a buffer in a graph; a key is its own key.

    Does not keep the buffer alive, and is not used again after it.
    """
    return buffer if isinstance(buffer, int) else _buffers.key_of(buffer)


class _Buffers:
    """Buffers by number, weakly: an operation of `torch.library` takes numbers, not buffers."""

    def __init__(self) -> None:
        self._by_key = weakref.WeakValueDictionary[int, Buffer]()
        self._next_key = 1
        self._lock = threading.Lock()

    def key_of(self, buffer: Buffer) -> int:
        with self._lock:
            known = [key for key, other in self._by_key.items() if other is buffer]
            return known[0] if known else self._add(buffer)

    def _add(self, buffer: Buffer) -> int:
        key = self._next_key
        self._by_key[key] = buffer
        self._next_key += 1
        return key

    def __getitem__(self, key: int) -> Buffer:
        buffer = self._by_key.get(int(key))
        if buffer is None:
            raise HandleError(f"buffer {key} is gone: keep a Buffer until backward has run")
        return buffer


_buffers = _Buffers()


def _in_graph(x: Tensor) -> Tensor:
    """`x`, or a leaf in its place where a tensor without rows would drop out of the graph.

    A compiled function cannot make a leaf: there `x` or the weights have to need gradients.
    """
    if torch.compiler.is_compiling() or x.requires_grad or not torch.is_grad_enabled():
        return x
    return x if x.shape[0] else x.detach().requires_grad_()


@torch.library.custom_op("crossdock::dispatch", mutates_args=())
def _dispatch(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, num_experts: int, key: int
) -> list[Tensor]:
    buffer = _buffers[key]
    to_rank, _, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    received: Any = buffer.dispatch(
        x,
        num_tokens_per_rank=to_rank,
        is_token_in_rank=is_in_rank,
        num_tokens_per_expert=to_expert,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
    )
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, _ = received
    num_rows = torch.tensor(counts, dtype=torch.int64, device="cpu")
    return [recv_x, recv_topk_idx, recv_topk_weights, num_rows, *handle, _nothing(x, 0)]


@torch.library.custom_op("crossdock::resend", mutates_args=())
def _resend(x: Tensor, handle: Sequence[Tensor], *, key: int) -> Tensor:
    recv_x, *_ = _buffers[key].dispatch(x, handle=_bare(handle))
    return recv_x


@torch.library.custom_op("crossdock::combine", mutates_args=())
def _combine(
    x: Tensor, topk_weights: Tensor | None, handle: Sequence[Tensor], *, key: int
) -> tuple[Tensor, Tensor]:
    combined, weights, _ = _buffers[key].combine(x, _bare(handle), topk_weights=topk_weights)
    return combined, _nothing(combined, combined.shape[0], 0) if weights is None else weights


def _bare(handle: Sequence[Tensor]) -> Handle:
    """The handle without its tie, if it has one."""
    return Handle(*handle[: len(Handle._fields)])


def _nothing(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


@_dispatch.register_fake
def _(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, num_experts: int, key: int
) -> list[Tensor]:
    num_ranks, num_tokens, num_slots = _buffers[key].group_size, *topk_idx.shape
    num_rows = torch.library.get_ctx().new_dynamic_size()

    def int32(*shape: Any) -> Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    return [
        x.new_empty(num_rows, x.shape[1]),
        topk_idx.new_empty(num_rows, num_slots),
        topk_weights.new_empty(num_rows, num_slots),
        torch.empty(num_experts // num_ranks, dtype=torch.int64, device="cpu"),
        int32(num_ranks, num_ranks),
        int32(num_ranks, 1),
        int32(num_ranks, 1),
        int32(num_rows),
        x.new_empty(num_tokens, num_ranks, dtype=torch.bool),
        int32(num_tokens, num_ranks),
        _nothing(x, 0),
    ]


@_resend.register_fake
def _(x: Tensor, handle: Sequence[Tensor], **_: int) -> Tensor:
    return x.new_empty(_bare(handle).num_recv_rows, x.shape[1])


@_combine.register_fake
def _(
    x: Tensor, topk_weights: Tensor | None, handle: Sequence[Tensor], **_: int
) -> tuple[Tensor, Tensor]:
    num_tokens = _bare(handle).num_tokens
    num_slots = 0 if topk_weights is None else topk_weights.shape[1]
    return x.new_empty(num_tokens, x.shape[1]), _nothing(x, num_tokens, num_slots)


def _save_dispatch(
    ctx: Any, *, keyword_only_inputs: dict[str, int], output: list[Tensor], **_: Any
) -> None:
    ctx.save_for_backward(output[1], *output[4:-1])
    ctx.key = keyword_only_inputs["key"]


def _save_handle(
    ctx: Any, *, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, int], **_: Any
) -> None:
    handle = inputs[-1]
    ctx.save_for_backward(*_bare(handle))
    ctx.key = keyword_only_inputs["key"]
    ctx.has_tie = len(handle) > len(Handle._fields)
    ctx.has_weights = len(inputs) == 3 and inputs[1] is not None


def _dispatch_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    recv_topk_idx, *handle = ctx.saved_tensors
    grad_weights = grads[2].masked_fill(recv_topk_idx < 0, 0.0)
    grad_x, grad_weights = _combine(grads[0].contiguous(), grad_weights, handle, key=ctx.key)
    return grad_x, None, grad_weights


def _resend_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    handle = list(ctx.saved_tensors)
    grad_x, _ = _combine(grad.contiguous(), None, handle, key=ctx.key)
    return grad_x, [None] * len(handle)


def _combine_backward(ctx: Any, grad: Tensor, grad_weights: Tensor) -> tuple[Any, ...]:
    handle = list(ctx.saved_tensors)
    grad_x = _resend(grad.contiguous(), handle, key=ctx.key)
    grad_w = _resend(grad_weights.contiguous(), handle, key=ctx.key) if ctx.has_weights else None
    return grad_x, grad_w, [None] * len(handle) + [_nothing(grad_x, 0)] * ctx.has_tie


_dispatch.register_autograd(_dispatch_backward, setup_context=_save_dispatch)
_resend.register_autograd(_resend_backward, setup_context=_save_handle)
_combine.register_autograd(_combine_backward, setup_context=_save_handle)
