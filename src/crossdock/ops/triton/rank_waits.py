"""How long a rank is waited for in a high-throughput call, measured by programs of their own.

A program for each rank watches its flags and does nothing else, so that what it measures does not
depend on how the work is divided, and calls that are not asked for it pay nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.ops.triton.links import words_at
from crossdock.ops.triton.sync import time_flags

__all__ = ["add_wait"]

AT_ONCE = tl.constexpr(128)


@triton.jit
def add_wait(waits, src, spent, flags, num_flags, number, link, phase, G: tl.constexpr):
    """Add to what is known of a rank the time until all of its flags are there.

    Args:
        waits: address of [R] int64, microseconds; in the interpreter polls.
        src: the rank.
        spent: what was spent on it before.
        flags: address of its flags.
        num_flags: how many there are.
        number: of the round.
        link: see `Link`.
        phase: what this wait is, for the report.
        G: see `Group`.

    Example (R=2): waits [5, 0], all flags of rank 1 come after 7 us, spent 2 -> waits [5, 9]
    """
    for begin in range(0, num_flags, AT_ONCE):
        nth = begin + tl.arange(0, AT_ONCE)
        words = words_at(flags, 4) + nth
        spent += time_flags(words, nth < num_flags, nth * 0 + src, number, link, phase, G, 0)
    words = words_at(waits, 8) + src
    tl.store(words, tl.load(words) + spent)
