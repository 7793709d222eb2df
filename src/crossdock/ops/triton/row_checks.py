"""Sums that travel with rows where `CROSSDOCK_DEBUG` is set, and what happens if they are wrong.

A row that is read before it has come, or that was written over, is reported as damaged; the call
then ends as one does whose rows never came.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.sync import condemn

__all__ = ["check_sums", "sums_of"]

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
