"""The oracle of decoding: what the low-latency calls must return, the slow and obvious way.

It judges the library as `reference` does, for the calls that place rows by expert and may encode
them: the bytes of every format, found by looking for the nearest value in a list of all values; the
rows that each expert receives; and the weighted sums that come back. It shares no code with what it
judges, and asks no cast of torch to round for it. Padding, strides and the order in which partial
sums are rounded are left to the tests.

One world is used in all examples below, the one of `reference`: 2 ranks, 4 experts (0 and 1 live
on rank 0, 2 and 3 on rank 1), two choices a token, three tokens on rank 0 and one on rank 1::

    topk_idxs = [tensor([[0, 2], [1, -1], [3, 3]]), tensor([[2, 0]])]

Letters: R ranks, E experts, L = E / R experts of a rank, T tokens of a rank, K choices a token,
H hidden, S scales of a row, N rows received by an expert.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from crossdock.reference import Origin, ReferenceCombine

__all__ = ["FORMATS", "ReferenceSlabs", "arrivals", "combine", "decode", "dispatch", "encode"]

FORMATS = ("bf16", "fp8", "fp8_round_scale", "fp8_ue8m0", "int8")
"""How a token may be encoded: the names that `encode`, `decode` and `dispatch` know."""

Encoded: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""A payload `[T, H]`, or a payload with its scales: `[T, S]`, or `[T]` for int8."""

_BLOCK = 128
"""Columns that share a scale, in the fp8 formats."""
_MAX_E4M3 = 448.0
_MAX_INT8 = 127.0
_MIN_AMAX = 1e-4


class ReferenceSlabs(NamedTuple):
    """What one rank receives, by local expert.

    Attributes:
        rows: Of every local expert, its payload `[N, H]`: by source rank, then token.
        scales: Of every local expert, the scales of its rows, `[N, S]`, or `[N]` for int8; None
            for bf16.
        recv_count: Of every local expert, N.
        src_info: Of every local expert, each row's token index on its source rank.
        layout_range: Of every local expert and every source rank, (begin, count) of its rows.
    """

    rows: list[Tensor]
    scales: list[Tensor] | None
    recv_count: list[int]
    src_info: list[list[int]]
    layout_range: list[list[tuple[int, int]]]


def encode(x: Tensor, format: str) -> Encoded:  # noqa: A002 - the word of the house
    """Encode every token.

    All quotients and products are float32, correctly rounded. `amax` is the largest magnitude of a
    block of 128 columns (fp8, at least 1e-4) or of the whole row (int8):

    ================= ======================= ============================= =====================
    format            scale                   element                       scales
    ================= ======================= ============================= =====================
    `bf16`            none                    `x`                           none
    `fp8`             `amax / 448`            e4m3 next to `x * (448/amax)` float32 `[T, H/128]`
    `fp8_round_scale` the same, rounded up to e4m3 next to `x / scale`      float32 `[T, H/128]`
                      a power of two
    `fp8_ue8m0`       the same, `2**(b-127)`  the same                      int32 `[T, H/512]`: of
                      as its byte `b`                                       four, the first lowest
    `int8`            `1 / (127/amax)`        integer next to               float32 `[T]`
                                              `x * (127/amax)`
    ================= ======================= ============================= =====================

    "Next" is the nearest value, of two equally near ones the even one. A zero keeps its sign in
    e4m3. Rows whose `127 / amax` is infinite, such as rows of zeros, are zeros with scale 0.

    What cannot be encoded stays visible: a block with an infinity or a NaN decodes to NaN
    throughout. Its bytes are all 0x7f in e4m3 (NaN), all 0 in int8; its scale is what the rules
    above make of the infinity or the NaN (0x7fc00000), but powers of two are infinite, and the byte
    is 255 (NaN), in both cases.

    Example: `x = [[448, 18, -17, 0.01, 0, ...]]`, 128 columns, gives scale 1 and, as fp8, the
    values `[[448, 18, -16, 5 * 2**-9, 0, ...]]`, bytes `[[0x7e, 0x59, 0xd8, 0x05, 0, ...]]`: e4m3
    has 16 and 18 but not 17, and -16 has the even byte.

    Args:
        x: `[T, H]` bf16 on the CPU; H a multiple of 128 for fp8, of 512 with UE8M0.
        format: One of `FORMATS`.

    Raises:
        ValueError: The format is not one of them.
    """
    if format == "bf16":
        return x.clone()
    if format == "int8":
        return _encode_int8(x.double())
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    return _encode_fp8(x.double().contiguous(), format)


def decode(encoded: Encoded, format: str) -> Tensor:  # noqa: A002 - the word of the house
    """Give the values `[T, H]` that encoded tokens stand for, exactly, in float64.

    Example: e4m3 bytes `[[0x7e, 0x59, 0xd8, ...]]` with scale `[[2]]` give `[[896, 36, -32, ...]]`.
    """
    if isinstance(encoded, Tensor):
        return encoded.double()
    payload, scales = encoded
    if format == "int8":
        return payload.double() * scales.double().unsqueeze(1)
    if format == "fp8_ue8m0":
        powers = torch.cat([_powers_of_two(), _tensor([math.nan])])
        scales = powers[_unpack_bytes(scales)]
    magnitudes = torch.cat([_e4m3_magnitudes(), _tensor([math.nan])])
    values = torch.cat([magnitudes, -magnitudes])[payload.view(torch.uint8).long()]
    return values * scales.double().repeat_interleave(_BLOCK, dim=1)


def arrivals(
    topk_idxs: Sequence[Tensor], *, num_experts: int, live: Collection[int] | None = None
) -> list[list[Origin]]:
    """List for every expert the origins of its rows: by source rank, inside a source by token.

    A token sends one row to each expert it names, however often it names it; -1 names none.

    Example: the world above gives `[[(0, 0), (1, 0)], [(0, 1)], [(0, 0), (1, 0)], [(0, 2)]]`;
    with `live={0}` it gives `[[(0, 0)], [(0, 1)], [], []]`.

    Args:
        topk_idxs: Of every rank, `[T, K]` integers, global expert ids, -1 = none.
        num_experts: E, a multiple of R.
        live: The ranks that take part: others send nothing and receive nothing. None: all.
    """
    num_local = num_experts // len(topk_idxs)
    alive = range(len(topk_idxs)) if live is None else live
    origins: list[list[Origin]] = [[] for _ in range(num_experts)]
    for source, topk_idx in enumerate(topk_idxs):
        for token, choices in enumerate(topk_idx.tolist()):
            for expert in set(choices):
                if expert >= 0 and {source, expert // num_local} <= set(alive):
                    origins[expert].append((source, token))
    return origins


def dispatch(
    xs: Sequence[Tensor],
    topk_idxs: Sequence[Tensor],
    *,
    num_experts: int,
    format: str,  # noqa: A002 - the word of the house
    live: Collection[int] | None = None,
) -> list[ReferenceSlabs]:
    """Say what every rank receives: of each local expert, the rows of the tokens that named it.

    Example: the world above with `xs = [[[10], [20], [30]], [[40]]]` as bf16 gives::

        rank 0: rows = [[[10], [40]], [[20]]]    rank 1: rows = [[[10], [40]], [[30]]]
                recv_count = [2, 1]                      recv_count = [2, 1]
                src_info = [[0, 0], [1]]                 src_info = [[0, 0], [2]]

    and both `layout_range = [[(0, 1), (1, 1)], [(0, 1), (1, 0)]]`: of the first expert's rows,
    rank 0 sent one from row 0 on and rank 1 one from row 1 on; all of the second's are rank 0's.

    Args:
        xs: Of every rank, its tokens `[T, H]` bf16.
        topk_idxs: Of every rank, `[T, K]` integers, global expert ids, -1 = none.
        num_experts: E, a multiple of R.
        format: One of `FORMATS`.
        live: The ranks that take part: others send nothing and receive nothing. None: all.
    """
    num_ranks, num_local = len(xs), num_experts // len(xs)
    origins = arrivals(topk_idxs, num_experts=num_experts, live=live)
    parts = [_parts(encode(x, format)) for x in xs]
    received = []
    for rank in range(num_ranks):
        mine = origins[rank * num_local : (rank + 1) * num_local]
        gathered = [
            [_gather([part[i] for part in parts], arrived) for arrived in mine]
            for i in range(len(parts[0]))
        ]
        received.append(
            ReferenceSlabs(
                rows=gathered[0],
                scales=gathered[1] if len(gathered) > 1 else None,
                recv_count=[len(arrived) for arrived in mine],
                src_info=[[token for _, token in arrived] for arrived in mine],
                layout_range=[_ranges(arrived, num_ranks) for arrived in mine],
            )
        )
    return received


def combine(
    rows: Sequence[Sequence[Tensor]],
    topk_idxs: Sequence[Tensor],
    topk_weights: Sequence[Tensor],
    *,
    num_experts: int,
    live: Collection[int] | None = None,
) -> list[ReferenceCombine]:
    """Say what every rank gets back: for each token its experts' rows, weighted and summed.

    The weights of an expert that a token names twice add up. A token without an expert, or with
    none on a live rank, gets zeros, as does every token of a rank that is not alive.

    Example: in the world above each expert sends back what it received::

        rows = [[[[10], [40]], [[20]]], [[[10], [40]], [[30]]]]
        topk_weights = [[[.5, .25], [1, 9], [.5, .25]], [[1, 2]]]
        combined = [[[7.5], [20], [22.5]], [[120]]]

    Args:
        rows: Of every rank and every local expert, `[N, H]`: one row for each that dispatch gave
            it, in the same order. Rows beyond N are not read.
        topk_idxs: The choices that dispatch was given.
        topk_weights: Of every rank, `[T, K]`; not read where `topk_idxs` has -1.
        num_experts: E, a multiple of R.
        live: As dispatch was given it.

    Returns:
        Sums and magnitudes in float64; `topk_weights` is None, since nothing travels beside rows.
    """
    num_local = num_experts // len(rows)
    hidden = next(slab.shape[1] for slabs in rows for slab in slabs)
    sums, sizes = (
        [torch.zeros((len(idx), hidden), dtype=torch.float64, device="cpu") for idx in topk_idxs]
        for _ in range(2)
    )
    origins = arrivals(topk_idxs, num_experts=num_experts, live=live)
    for expert, arrived in enumerate(origins):
        for row, (source, token) in enumerate(arrived):
            sent = rows[expert // num_local][expert % num_local][row].double()
            for slot, choice in enumerate(topk_idxs[source][token].tolist()):
                if choice == expert:
                    addend = sent * topk_weights[source][token, slot].double()
                    sums[source][token] += addend
                    sizes[source][token] += addend.abs()
    return [ReferenceCombine(each, None, size) for each, size in zip(sums, sizes, strict=True)]


def _encode_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(dim=1)
    factor = _to_float32(_tensor(_MAX_INT8) / amax)
    elements = _to_float32(x * factor.unsqueeze(1)).round()  # of two integers, the even one
    is_lost = elements.isnan() | factor.isinf().unsqueeze(1)
    scale = _to_float32(_tensor(1.0) / factor)
    return elements.masked_fill(is_lost, 0).to(torch.int8), scale.float()


def _encode_fp8(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    blocks = x.unflatten(1, (x.shape[1] // _BLOCK, _BLOCK))
    amax = torch.maximum(blocks.abs().amax(dim=2), _to_float32(_tensor(_MIN_AMAX)))
    scales = _to_float32(amax / _tensor(_MAX_E4M3))
    codes = torch.searchsorted(_powers_of_two(), scales)  # the first large enough
    if form == "fp8":
        elements = blocks * _to_float32(_tensor(_MAX_E4M3) / amax).unsqueeze(2)
    else:
        scales = torch.cat([_powers_of_two(), _tensor([math.inf])])[codes]
        elements = blocks / scales.unsqueeze(2)
    is_lost = ~amax.isfinite().unsqueeze(2)
    payload = _to_e4m3(_to_float32(elements).masked_fill(is_lost, math.nan).flatten(1))
    return payload, (_pack_bytes(codes) if form == "fp8_ue8m0" else scales.float())


def _tensor(values: float | Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _to_float32(values: Tensor) -> Tensor:
    """Round to float32, but stay in float64; every NaN becomes the same one.

    The product of two float32 is exact in float64, so here it is rounded once. A quotient is
    rounded twice, which is the same as once, since float64 has more than twice the digits. (Both
    sides of a quotient must be tensors: torch multiplies a number by the reciprocal instead.)
    """
    rounded = values.to(torch.float32).to(torch.float64)
    return rounded.masked_fill(rounded.isnan(), math.nan)


def _e4m3_magnitudes() -> Tensor:
    """The value of each e4m3 byte from 0 to 126, ascending: 0, 2**-9, 2 * 2**-9, ..., 448.

    A byte is 4 bits of exponent and 3 of mantissa, below the sign; byte 127 is NaN.
    """
    fields = [divmod(byte, 8) for byte in range(127)]
    return _tensor([(8 + m) * 2.0 ** (e - 10) if e else m * 2.0**-9 for e, m in fields])


def _to_e4m3(values: Tensor) -> Tensor:
    """Find the nearest e4m3 value, of two equally near ones the one with the even byte.

    Values beyond 448, by a hair where a factor was rounded up, become 448.
    """
    magnitudes = _e4m3_magnitudes()
    halfway = (magnitudes[:-1] + magnitudes[1:]) / 2
    size = values.abs()
    lower = torch.searchsorted(halfway, size)
    upper = torch.searchsorted(halfway, size, right=True)  # another one exactly halfway only
    nearest = torch.where(lower % 2 == 0, lower, upper).masked_fill(values.isnan(), 127)
    codes = torch.where(values.signbit(), nearest + 128, nearest)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def _powers_of_two() -> Tensor:
    """The value of each UE8M0 byte from 0 to 254, ascending: 2**-127, ..., 2**127. 255 is NaN."""
    return _tensor([2.0 ** (byte - 127) for byte in range(255)])


def _pack_bytes(codes: Tensor) -> Tensor:
    """Put four bytes each into an int32, the first into the lowest bits: [1, 2, 0, 0] is 513."""
    places = torch.tensor([1, 2**8, 2**16, 2**24], dtype=torch.int64, device="cpu")
    words = (codes.unflatten(1, (codes.shape[1] // 4, 4)) * places).sum(dim=2)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def _unpack_bytes(packed: Tensor) -> Tensor:
    words = packed.long()
    return torch.stack([(words >> shift) % 256 for shift in (0, 8, 16, 24)], dim=2).flatten(1)


def _parts(encoded: Encoded) -> tuple[Tensor, ...]:
    return encoded if isinstance(encoded, tuple) else (encoded,)


def _gather(parts: Sequence[Tensor], origins: Sequence[Origin]) -> Tensor:
    """Copy the rows of the given origins, or their scales."""
    shape = (len(origins), *parts[0].shape[1:])
    gathered = torch.empty(shape, dtype=parts[0].dtype, device="cpu")
    for row, (source, token) in enumerate(origins):
        gathered[row] = parts[source][token]
    return gathered


def _ranges(origins: Sequence[Origin], num_ranks: int) -> list[tuple[int, int]]:
    """Give (begin, count) of the rows of each source rank."""
    sources = [source for source, _ in origins]
    return [
        (sum(source < rank for source in sources), sources.count(rank)) for rank in range(num_ranks)
    ]
