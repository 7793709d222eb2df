"""What the low-latency dispatch kernel is told, as named tuples of numbers.

T tokens here, K top-k, R ranks, E experts, L local experts, M slots for the tokens of a rank,
H columns, S scales of a row.
"""

from __future__ import annotations

from typing import NamedTuple

from crossdock.ops.triton.links import Address

__all__ = ["Call", "ExpertRow", "Experts", "LandedViews", "Slabs", "Tokens", "Zone"]


class ExpertRow(NamedTuple):
    """How a row is made of bytes, as constants of a kernel.

    Attributes:
        rule, element, min_amax, use_casts: see `quantize.encode_row`; without a rule the bytes of
            x are moved as they are.
        block: columns that have a scale; 0 if the whole row has one.
        hidden: H.
        columns: columns of a piece, as it is encoded.
        num_bytes: of the payload.
        word: 16 where payloads are multiples of that, else the widest word they are made of.
        num_words, words: words of a payload (16 means two of 8 bytes), and of a piece.
        num_scales, padded_scales: 32-bit words of scales.
        scales_at, choices_at: where scales begin, and the words `(n-th of its expert, expert)`,
            behind which the weights are.
        checked, check_at: whether the sum of the payload travels with it, and where: see
            `row_checks`.
        stride: from row to row.
    """

    rule: str
    element: int
    min_amax: float
    use_casts: bool
    block: int
    hidden: int
    columns: int
    num_bytes: int
    word: int
    num_words: int
    words: int
    num_scales: int
    padded_scales: int
    scales_at: int
    choices_at: int
    checked: bool
    check_at: int
    stride: int


class Experts(NamedTuple):
    """What is chosen from, as constants of a kernel.

    Attributes:
        num_topk, padded_topk: K.
        local, padded_local: L.
        bins: E, padded to a power of two.
        tokens: tokens that are counted together, a power of two.
        has_weights: whether weights travel with the rows.
        compact: whether the experts' rows lie back to back.
        counts_waits, counts_rows: whether there are statistics to add to.
        viewed: whether rows stay where they land.
    """

    num_topk: int
    padded_topk: int
    local: int
    padded_local: int
    bins: int
    tokens: int
    has_weights: bool
    compact: bool
    counts_waits: bool
    counts_rows: bool
    viewed: bool


class Tokens(NamedTuple):
    """This rank's tokens: x [T, H], scales [T, S] of encoded ones, topk_idx and weights [T, K]."""

    x: Address
    scales: Address
    topk_idx: Address
    topk_weights: Address


class Zone(NamedTuple):
    """Offsets in the heap.

    Attributes:
        landing: [R, M] rows.
        flags: [R, M] int32, `2 * number + whether there is a row`.
        counts: [R, L] tagged: rows for each of the receiver's experts.
        told: [R, 2] tagged: number of tokens, and the ranks that are masked, a bit each; behind
            that, written here, the ranks whose rows this rank takes.
    """

    landing: Address
    flags: Address
    counts: Address
    told: Address


class Slabs(NamedTuple):
    """What dispatch brings. See `LowLatencyHandle`; behind `src_info` lies more, in its memory.

    Attributes:
        payload, scales: addresses.
        row_of: offset of [R, M, K] int32, the row that each choice of a token has here, or -1.
        weights: offset of [R, M, K] float32, if they came with the rows.
        num_sent: offset of [R] int32, tokens of each rank.
        waits, received: statistics.
        scale_expert, scale_row, scale_column: strides of the scales.
    """

    payload: Address
    scales: Address
    src_info: Address
    layout_range: Address
    recv_count: Address
    waits: Address
    received: Address
    row_of: int
    weights: int
    num_sent: int
    scale_expert: Address
    scale_row: int
    scale_column: int


class LandedViews(NamedTuple):
    """What dispatch brings where rows stay: addresses. See `LowLatencyViews`.

    Attributes:
        src_idx: [R, M] int32; behind it [R] int32, tokens of each rank, -1 of those that are lost.
        topk_idx, topk_weights: [R, M, K].
        waits: statistics.
    """

    src_idx: Address
    topk_idx: Address
    topk_weights: Address
    waits: Address


class Call(NamedTuple):
    """What changes from call to call.

    Attributes:
        num_tokens: T.
        num_slots: M.
        num_senders, num_placers: programs.
    """

    num_tokens: int
    num_slots: int
    num_senders: int
    num_placers: int
