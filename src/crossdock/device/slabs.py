"""Room for what a low-latency dispatch brings, laid out before the first call of its kind.

What combine needs beyond the handle lies behind `src_info` in the same memory, so that it is there
wherever the handle's tensors are.

R ranks, L local experts, M slots for the tokens of a rank, K top-k, A compact rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from crossdock.config import align
from crossdock.formats import TokenFormat
from crossdock.handle import LowLatencyHandle
from crossdock.ops.triton.expert_records import Experts

__all__ = ["Extras", "SlabLayout", "slab_layout"]


class Extras(NamedTuple):
    """What lies behind `src_info` in the same memory: offsets in words of 32 bits.

    Attributes:
        row_of, weights: [R, M, K]; without weights both are the same.
        num_sent: [R].
        num_words: of all.
    """

    row_of: int
    weights: int
    num_sent: int
    num_words: int

    @classmethod
    def of(cls, num_rows: int, num_choices: int, num_ranks: int, *, has_weights: bool) -> Extras:
        """Behind `num_rows` rows and for R * M * K choices."""
        row_of = align(num_rows, 4)
        weights = row_of + num_choices * has_weights
        num_sent = weights + num_choices
        return cls(row_of, weights, num_sent, num_sent + num_ranks)

    @classmethod
    def found(
        cls, num_rows: int, num_choices: int, num_ranks: int, *, num_words: int
    ) -> Extras | None:
        """Whichever of those that `of` gives takes so many words."""
        for has_weights in (False, True):
            extras = cls.of(num_rows, num_choices, num_ranks, has_weights=has_weights)
            if extras.num_words == num_words:
                return extras
        return None

    @property
    def has_weights(self) -> bool:
        """Whether weights came with the rows."""
        return self.weights != self.row_of


class SlabLayout(NamedTuple):
    """What a dispatch brings, but for the memory.

    Attributes:
        rows, info_strides: shape of `src_info`, and how it lies in its memory.
        payload, payload_strides: shape and strides.
        scales, scale_strides: shape, and strides in elements; None without scales.
        element, scale: dtypes.
        ranges: shape of `layout_range`, L and R.
        sizes: M, H, E, as the handle has them.
        extras: behind `src_info`.
    """

    rows: tuple[int, ...]
    info_strides: tuple[int, ...]
    payload: tuple[int, ...]
    payload_strides: tuple[int, ...]
    scales: tuple[int, ...] | None
    scale_strides: tuple[int, ...]
    element: torch.dtype
    scale: torch.dtype | None
    ranges: tuple[int, int]
    sizes: tuple[int, int, int]
    extras: Extras

    def allocate(
        self, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None, LowLatencyHandle]:
        """Payload, scales and handle, not initialised.

        With strides torch makes them in two thirds of the time.
        """
        empty = torch.empty_strided
        payload = empty(self.payload, self.payload_strides, dtype=self.element, device=device)
        words = empty((self.extras.num_words,), (1,), dtype=torch.int32, device=device)
        scales = None
        if self.scales is not None:
            scales = empty(self.scales, self.scale_strides, dtype=self.scale, device=device)
        handle = LowLatencyHandle(
            words.as_strided(self.rows, self.info_strides),
            empty(self.ranges, (self.ranges[1], 1), dtype=torch.int64, device=device),
            *self.sizes,
            empty(self.ranges[:1], (1,), dtype=torch.int32, device=device),
        )
        return payload, scales, handle

    @property
    def kernel_strides(self) -> tuple[int, int, int]:
        """Of scales, as `expert_records.Slabs` has them: from expert to expert, row, column."""
        columns = () if self.scales is None or len(self.scales) == len(self.payload) else (0,)
        strides = (*self.scale_strides, *columns)
        expert, row, column = (0,) * (3 - len(strides)) + strides
        return expert, row, column


def slab_layout(
    form: TokenFormat, hidden: int, *, num_slots: int, num_ranks: int, experts: Experts
) -> SlabLayout:
    """The layout of what dispatches bring; scales are column-major, as `codec.empty_scales` says.

    Args:
        form: how rows are encoded.
        hidden: H.
        num_slots: M.
        num_ranks: R.
        experts: what is chosen from.
    """
    num_rows = num_ranks * num_slots
    compact_rows = num_rows * min(experts.num_topk, experts.local)
    rows = (compact_rows,) if experts.compact else (experts.local, num_rows)
    row, scales = form.row(hidden), None
    strides: tuple[int, ...] = ()
    if row.scale is not None:
        scales = (*rows, row.num_scales) if form.block else rows
        lengths = (rows[-1] * row.num_scales, 1, rows[-1]) if form.block else (rows[-1], 1)
        strides = lengths[-len(scales) :]
    extras = Extras.of(
        math.prod(rows),
        num_rows * experts.num_topk,
        num_ranks,
        has_weights=experts.has_weights,
    )
    return SlabLayout(
        rows,
        (num_rows, 1)[-len(rows) :],
        (*rows, hidden),
        (num_rows * hidden, hidden, 1)[-len(rows) - 1 :],
        scales,
        strides,
        form.element,
        row.scale,
        (experts.local, num_ranks),
        (num_slots, hidden, experts.local * num_ranks),
        extras,
    )
