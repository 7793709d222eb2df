"""What dispatch returns and combine takes: tensors, frozen, a plain tuple at heart.

Clients store a handle with `ctx.save_for_backward(*handle)` and pass back the bare tuple, so
everything combine needs is in the six tensors; `Handle.of` gives the names back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from crossdock.errors import HandleError, ShapeError
from crossdock.topology import num_local_experts

__all__ = ["Handle", "LowLatencyHandle", "check_slab_shapes"]


class Handle(NamedTuple):
    """The memory of one dispatch. R ranks, T tokens here, N received rows.

    Attributes:
        rank_prefix_matrix: [R, R] int32; `[i][j]` = rows that rank `j` receives from ranks <= `i`.
            Equal on all ranks.
        channel_prefix_matrix: [R, 1] int32, rows sent to each rank.
        recv_channel_prefix_matrix: [R, 1] int32, rows received from each rank; of a dispatch on
            GPUs [1 + B, R, 2] int32, the same in `[0, :, 0]`, then for each of B groups of few
            tokens which rows of each rank are theirs.
        recv_src_idx: [N] int32, index of each received row among its source's tokens; [R, M] for
            rows that lie in M slots to each source.
        is_token_in_rank: [T, R] bool, whether a token was sent to a rank.
        send_head: [T, R] int32, which of the rows sent to that rank the token is; -1 if not sent.

    Lifetime: owns its tensors; valid as long as the buffer, for any number of calls.
    """

    rank_prefix_matrix: torch.Tensor
    channel_prefix_matrix: torch.Tensor
    recv_channel_prefix_matrix: torch.Tensor
    recv_src_idx: torch.Tensor
    is_token_in_rank: torch.Tensor
    send_head: torch.Tensor

    @classmethod
    def of(cls, handle: Sequence[torch.Tensor], *, num_ranks: int) -> Handle:
        """Name the tensors of a handle again, and check that it can be one of this group.

        Raises:
            HandleError: it has not six tensors, or belongs to a group of another size.
        """
        if len(handle) != len(cls._fields):
            raise HandleError(f"a handle has {len(cls._fields)} tensors, this has {len(handle)}")
        named = cls(*handle)
        if tuple(named.rank_prefix_matrix.shape) != (num_ranks, num_ranks):
            raise HandleError(
                f"the handle's rank_prefix_matrix is {tuple(named.rank_prefix_matrix.shape)}, "
                f"this buffer has {num_ranks} ranks"
            )
        return named

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank that were dispatched."""
        return self.is_token_in_rank.shape[0]

    @property
    def num_recv_rows(self) -> int:
        """Rows that dispatch returned here, padding included."""
        return self.recv_src_idx.numel()


class LowLatencyHandle(NamedTuple):
    """The memory of one low-latency dispatch. L local experts, R ranks, M slots for each rank.

    Attributes:
        src_info: [L, R * M] int32, the token that each row is, among its source's tokens; undefined
            where no row is. With compact rows [A], row by row.
        layout_range: [L, R] int64, `(begin << 32) | count`: the rows of an expert that came from a
            rank, `begin` counted from the expert's first row.
        num_max_dispatch_tokens_per_rank: M.
        hidden: H.
        num_experts: E.
        packed_recv_count: [L] int32, rows of each expert.

    Lifetime: owns its tensors, which are complete once the rows have been received; valid as long
    as the buffer, for any number of combines.
    """

    src_info: torch.Tensor
    layout_range: torch.Tensor
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    packed_recv_count: torch.Tensor

    @classmethod
    def of(cls, handle: Sequence[torch.Tensor | int], *, num_ranks: int) -> LowLatencyHandle:
        """Name the parts of a handle again; the sixth may be missing.

        Raises:
            HandleError: it is no handle of a low-latency dispatch in a group of this size.
        """
        if len(handle) not in (5, 6):
            raise HandleError(f"a low-latency handle has 5 or 6 parts, this has {len(handle)}")
        tensors = [part for part in handle[:2] if isinstance(part, torch.Tensor)]
        sizes = [part for part in handle[2:5] if isinstance(part, int)]
        if (len(tensors), len(sizes)) != (2, 3):
            raise HandleError("this is the handle of a high-throughput dispatch, or of none")
        src_info, layout_range = tensors
        num_slots, hidden, num_experts = sizes
        count = handle[5] if len(handle) == 6 else None
        if not isinstance(count, torch.Tensor):
            count = (layout_range & 0xFFFFFFFF).sum(1, dtype=torch.int32)
        check_slab_shapes(
            src_info.shape,
            layout_range.shape,
            num_slots=num_slots,
            num_experts=num_experts,
            num_ranks=num_ranks,
        )
        return cls(src_info, layout_range, num_slots, hidden, num_experts, count)

    @property
    def num_slots(self) -> int:
        """M, under its short name."""
        return self.num_max_dispatch_tokens_per_rank

    @property
    def slab_rows(self) -> int:
        """Rows of an expert's slab; 0 with compact rows."""
        return 0 if self.is_compact else self.src_info.shape[1]

    @property
    def is_compact(self) -> bool:
        """Whether dispatch laid the experts' rows back to back."""
        return self.src_info.dim() == 1


def check_slab_shapes(
    src_info: Sequence[int],
    layout_range: Sequence[int],
    *,
    num_slots: int,
    num_experts: int,
    num_ranks: int,
) -> None:
    """Raise `HandleError` unless the shapes in a handle fit each other and a group of this size.

    Args:
        src_info: its shape.
        layout_range: its shape.
        num_slots: M.
        num_experts: E.
        num_ranks: R.
    """
    try:
        experts_here = num_local_experts(num_experts, num_ranks)
    except ShapeError as error:
        raise HandleError(f"the handle is of another group: {error}") from error
    slab, ranges = (experts_here, num_ranks * num_slots), (experts_here, num_ranks)
    fits = len(src_info) == 1 or tuple(src_info) == slab
    if tuple(layout_range) != ranges or not fits:
        raise HandleError(
            f"the handle has src_info {tuple(src_info)} and layout_range {tuple(layout_range)}; "
            f"for {num_ranks} ranks and {num_experts} experts they are {slab} and {ranges}"
        )
