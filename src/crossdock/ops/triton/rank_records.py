"""What the kernels of high-throughput calls are told, as named tuples of numbers.

Those of a dispatch come first, then those of a combine.

T tokens here, K top-k, R ranks, E experts, L local experts, M slots for the tokens of a rank,
N received rows, H columns, C flags of a source, B of one on the way back.
"""

from __future__ import annotations

from typing import NamedTuple

from crossdock.ops.triton.links import Address

__all__ = [
    "BackCall",
    "BackRow",
    "BackZone",
    "RankRow",
    "Received",
    "RowZone",
    "Rows",
    "Sent",
    "SentCall",
    "Sums",
]


class RankRow(NamedTuple):
    """How a row is made of bytes, as constants of a kernel.

    Attributes:
        num_bytes, word, num_words, padded_words: of the payload; see `ExpertRow`.
        scale_words, padded_scales: 32-bit words of scales.
        scales_at, check_at, stride: where scales and a sum begin, and from row to row.
        num_topk, padded_topk: K; 0 if the call names no experts.
        has_weights: whether weights travel.
        local: L.
        rows: rows that a program moves at once, a power of two.
        chunk: tokens that it is busy with at a time, a power of two.
        unit, back: tokens that a flag covers here and on the way back, of which chunks consist.
        checked: whether sums of rows travel with them, 8 bytes behind the scales.
        viewed: whether rows stay where they land, a slot for each row that is sent; otherwise there
            is one for each token.
    """

    num_bytes: int
    word: int
    num_words: int
    padded_words: int
    scale_words: int
    padded_scales: int
    scales_at: int
    check_at: int
    stride: int
    num_topk: int
    padded_topk: int
    has_weights: bool
    local: int
    rows: int
    chunk: int
    unit: int
    back: int
    checked: bool
    viewed: bool


class Sent(NamedTuple):
    """This rank's tokens, and where they go.

    Attributes:
        x, scales: addresses of [T, ...] payloads and scales.
        topk_idx, topk_weights: [T, K].
        is_token_in_rank: [T, R].
        send_head: [T, R] int32, which of the rows for a rank a token is, or -1.
        num_sent: [R] int32, rows for each rank.
    """

    x: Address
    scales: Address
    topk_idx: Address
    topk_weights: Address
    is_token_in_rank: Address
    send_head: Address
    num_sent: Address


class Received(NamedTuple):
    """What comes: addresses of [N, ...] payloads and scales, and the parts of the handle.

    Attributes:
        chunks: [1 + B, R, 2] int32: rows and tokens of each source; then of the tokens of each flag
            on the way back the first row among those of their source, and how many.
        waits: [R] int64, microseconds that each source was waited for, to be added to.
    """

    x: Address
    scales: Address
    topk_idx: Address
    topk_weights: Address
    src_idx: Address
    rank_prefix_matrix: Address
    chunks: Address
    waits: Address


class RowZone(NamedTuple):
    """Offsets in the heap.

    Attributes:
        landing: [R, M] rows.
        heads: [R, M] int32, `send_head` of each token for the receiver.
        choices: [R, M, K] int32, ids that each token chose; behind them float32 weights.
        flags: [R, C] int32, the number of the round.
        numbered: [2, R] int32, the same, from who has written its heads here; then for whom this
            rank has numbered its rows.
        told: [R, R + 2] tagged: rows for each rank, number of tokens, fingerprint of the call.
        counts: [R, L] tagged: occurrences of each of the receiver's experts.
    """

    landing: Address
    heads: Address
    choices: Address
    flags: Address
    numbered: Address
    told: Address
    counts: Address


class SentCall(NamedTuple):
    """What changes from call to call: T, M, C, programs, N, and a fingerprint.

    Of views, N is R times the slots of each source.
    """

    num_tokens: int
    num_slots: int
    num_flags: int
    num_programs: int
    num_rows: int
    fingerprint: int


class BackRow(NamedTuple):
    """How a row is made, as constants of a kernel.

    Attributes:
        element: Triton's name of the dtype.
        hidden, padded: H, and the next power of two.
        num_bytes, word, num_words, padded_words: of a row; see `ExpertRow`.
        weights_at, check_at, stride: where float32 weights and a sum begin, and from row to row.
        num_topk, padded_topk: K; 0 without weights.
        num_bias: 0, 1 or 2.
        rows: rows that a sender moves at once.
        sums: tokens whose rows are added up at once, a power of two.
        terms, parts: ranks whose rows are added at once, and how often that has to be done.
        chunk: tokens that a program is busy with at a time, a power of two.
        unit: tokens that a flag covers, of which chunks consist.
        checked: whether sums of rows travel with them, 8 bytes behind the weights.
    """

    element: int
    hidden: int
    padded: int
    num_bytes: int
    word: int
    num_words: int
    padded_words: int
    weights_at: int
    check_at: int
    stride: int
    num_topk: int
    padded_topk: int
    num_bias: int
    rows: int
    sums: int
    terms: int
    parts: int
    chunk: int
    unit: int
    checked: bool


class Rows(NamedTuple):
    """What goes back: x [N, H], weights [N, K], and the handle; see `Received`."""

    x: Address
    topk_weights: Address
    src_idx: Address
    rank_prefix_matrix: Address
    chunks: Address


class Sums(NamedTuple):
    """What comes: out [T, H], weights [T, K]; biases [T, H], and `send_head` [T, R].

    Also [R] int64, to which microseconds that each rank was waited for are added.
    """

    out: Address
    topk_weights: Address
    bias: Address
    more_bias: Address
    send_head: Address
    waits: Address


class BackZone(NamedTuple):
    """Offsets in the heap.

    Attributes:
        landing: [R, M] rows, by the rank that sends them.
        flags: [R, B] int32, the number of the round.
        kept: [R] tagged: rows of this rank that a rank has.
    """

    landing: Address
    flags: Address
    kept: Address


class BackCall(NamedTuple):
    """What changes from call to call: T, M, B, N, and programs.

    Attributes:
        spacing: rows from those of a source to those of the next one; 0 where there are no gaps.
    """

    num_tokens: int
    num_slots: int
    num_flags: int
    num_rows: int
    spacing: int
    num_senders: int
    num_reducers: int
