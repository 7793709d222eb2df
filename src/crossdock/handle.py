"""What dispatch returns and combine takes: tensors, frozen, a plain tuple at heart.

Clients store a handle with `ctx.save_for_backward(*handle)` and pass back the bare tuple, so
everything combine needs is in the six tensors; `Handle.of` gives the names back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from crossdock.errors import HandleError

__all__ = ["Handle"]


class Handle(NamedTuple):
    """The memory of one dispatch. R ranks, T tokens here, N received rows.

    Attributes:
        rank_prefix_matrix: [R, R] int32; `[i][j]` = rows that rank `j` receives from ranks <= `i`.
            Equal on all ranks.
        channel_prefix_matrix: [R, 1] int32, rows sent to each rank.
        recv_channel_prefix_matrix: [R, 1] int32, rows received from each rank.
        recv_src_idx: [N] int32, index of each received row among its source's tokens.
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
        return self.recv_src_idx.shape[0]
