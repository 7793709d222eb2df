"""Rows in pieces: all of a row is on its way at once, and a part of it is computed with.

As it lies in memory a row takes few registers; as float32, with all that becomes of it, it takes
many, and the more a program takes, the fewer fit on a GPU. So pieces of a row are loaded first, as
they are, into a tuple, and then one after the other is computed with and stored. The order is that
of the program: nothing is loaded before what is stored above it, which might be the same memory.

Rows have WIDTH elements. Pieces have PIECE elements, a power of two, and begin at multiples of it;
the last of several is as narrow as a power of two can be. Masks are for that one: the compiler sees
that others need none.

Example (PIECE=8): a row of WIDTH=18 has pieces of 8, 8 and 2 elements; with WIDTH=21 the last has
    8, three of which lie beyond the row: they are 0, and are not written
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_piece", "load_pieces", "num_pieces", "store_piece"]


@triton.constexpr_function
def num_pieces(width: int, piece: int) -> int:
    """How many pieces a row has."""
    return -(-width // piece)


@triton.constexpr_function
def _size_of(nth: int, width: int, piece: int) -> int:
    return min(piece, 1 << (width - nth * piece - 1).bit_length()) if nth else piece


@triton.jit
def load_piece(row, nth: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """A piece of a row, given a pointer to the row."""
    lane = tl.arange(0, _size_of(nth, WIDTH, PIECE))
    begin = row + nth * PIECE
    return tl.load(begin + lane, mask=lane < WIDTH - nth * PIECE, other=0)


@triton.jit
def load_pieces(row, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """All pieces of a row: a tuple."""
    pieces = ()
    NUM: tl.constexpr = num_pieces(WIDTH, PIECE)
    for nth in tl.static_range(NUM):
        pieces += (load_piece(row, nth, WIDTH, PIECE),)
    return pieces


@triton.jit
def store_piece(row, nth: tl.constexpr, values, wanted, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """Write a piece of a row where it is wanted, all of it or nothing."""
    lane = tl.arange(0, values.numel)
    begin = row + nth * PIECE
    tl.store(begin + lane, values, mask=(lane < WIDTH - nth * PIECE) & wanted)
