"""What the kernels of a high-throughput dispatch are told of tensors: where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crossdock.ops.triton import rank_records

__all__ = ["addresses_received", "addresses_sent"]


def addresses_sent(
    planes: Sequence[torch.Tensor],
    in_rank: torch.Tensor,
    numbered: tuple[torch.Tensor, torch.Tensor],
    *,
    idx: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> rank_records.Sent:
    """What the kernels are told of rows to send; where something is missing, any address.

    Args:
        planes: payload, and scales if there are some.
        in_rank: [T, R] bool.
        numbered: `send_head` [T, R] and the number of rows for each rank [R, 1].
        idx: [T, K] int64.
        weights: [T, K] float32.
    """
    head, num_sent = numbered
    return rank_records.Sent(
        planes[0].data_ptr(),
        planes[-1].data_ptr(),
        (head if idx is None else idx).data_ptr(),
        (head if weights is None else weights).data_ptr(),
        in_rank.data_ptr(),
        head.data_ptr(),
        num_sent.data_ptr(),
    )


def addresses_received(
    rows: Sequence[torch.Tensor],
    of_handle: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    idx: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    waits: torch.Tensor | None = None,
) -> rank_records.Received:
    """What the kernels are told of rows to receive; where something is missing, any address.

    Args:
        rows: payload, and scales if there are some; nothing yet in `route`.
        of_handle: `recv_src_idx`, `rank_prefix_matrix` and the chunks.
        idx: [N, K] int64.
        weights: [N, K] float32.
        waits: [R] int64.
    """
    src_idx, prefix, chunks = of_handle
    return rank_records.Received(
        (rows[0] if rows else prefix).data_ptr(),
        (rows[-1] if rows else prefix).data_ptr(),
        (prefix if idx is None else idx).data_ptr(),
        (prefix if weights is None else weights).data_ptr(),
        src_idx.data_ptr(),
        prefix.data_ptr(),
        chunks.data_ptr(),
        (prefix if waits is None else waits).data_ptr(),
    )
