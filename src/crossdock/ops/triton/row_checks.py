"""Sums that travel with rows where `CROSSDOCK_DEBUG` is set, and what happens if they are wrong.

A row that is read before it has come, or that was written over, is reported as damaged; the call
then ends as one does whose rows never came.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.pieces import num_pieces
from crossdock.ops.triton.sync import condemn

__all__ = ["check_sum", "check_sums", "sum_of", "sum_of_pieces", "sums_of"]

DAMAGE = tl.constexpr(14)


@triton.jit
def sums_of(words):
    """The sum of the halves of 16 bits of each row, whatever words it is read in: [N] int64.

    Example: words [[1, 2], [3, 1 << 16]] -> [3, 4]
    """
    WIDTH: tl.constexpr = words.dtype.primitive_bitwidth
    words = words.to(tl.int64)
    total = words & 0xFFFF
    for begin in tl.static_range(16, WIDTH, 16):
        total += (words >> begin) & 0xFFFF
    return tl.sum(total, 1)


@triton.jit
def sum_of(piece):
    """The same of a piece of a row that begins at an even byte; bytes are taken in pairs: int64.

    Example: bytes [1, 2, 3] -> 1 + 2 * 256 + 3, which is the sum of the halves 513 and 3
    """
    if piece.dtype.primitive_bitwidth == 8:
        shift = 8 * (tl.arange(0, piece.numel) % 2).to(tl.int64)
        return tl.sum((piece.to(tl.int8, bitcast=True).to(tl.int64) & 0xFF) << shift, 0)
    else:
        return tl.sum(sums_of(tl.reshape(piece, [1, piece.numel])), 0)


@triton.jit
def sum_of_pieces(row, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """The same of a row in pieces: see `pieces`."""
    total = tl.zeros([], tl.int64)
    for nth in tl.static_range(num_pieces(WIDTH, PIECE)):
        lane = nth * PIECE + tl.arange(0, row[nth].numel)
        total += sum_of(tl.where(lane < WIDTH, row[nth], 0))
    return total


@triton.jit
def check_sums(sums, told, kept, src, number, link, G: tl.constexpr):
    """Report a rank of whose rows some have other sums than it told.

    Args:
        sums: [N] int64, of what has come.
        told: [N] int64, of what was sent.
        kept: [N] bool, which rows there are.
        src: the rank.
        number: of the round.
        link: see `Link`.
        G: see `Group`.
    """
    if tl.max(((sums != told) & kept).to(tl.int32)) > 0:
        condemn(src, number, link, DAMAGE, G)


@triton.jit
def check_sum(found, told, src, number, link, G: tl.constexpr):
    """The same of one row, where there is one."""
    if found != told:
        condemn(src, number, link, DAMAGE, G)
