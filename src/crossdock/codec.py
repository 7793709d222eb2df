"""Rows of any format as planes of bytes, and back.

A plane is a contiguous [T, width] tensor; a row of tokens is the same row of every plane. Payload
and scales travel as two planes, so that each arrives as a contiguous tensor and nobody has to pick
them apart. High-throughput rows are moved bit for bit: no arithmetic happens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from crossdock.errors import ShapeError
from crossdock.formats import TokenFormat, check_element, check_scale

__all__ = ["AnyTokens", "Tokens", "join", "split", "token_format"]

Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""What callers pass as `x`: rows, or rows and their scales."""

AnyTokens = TypeVar("AnyTokens", torch.Tensor, tuple[torch.Tensor, torch.Tensor])
"""The same where the result is of the kind that was passed."""


def token_format(x: Tokens) -> TokenFormat:
    """The format of `x`.

    Raises:
        ShapeError: not two-dimensional, an element that is not moved, or scales of another length.
    """
    data, scales = x if isinstance(x, tuple) else (x, None)
    if data.dim() != 2:
        raise ShapeError("x", got=f"shape {tuple(data.shape)}", expected="[num_tokens, hidden]")
    check_element(data.dtype)
    if scales is None:
        return TokenFormat(data.dtype, data.shape[1])
    if scales.dim() != 2 or scales.shape[0] != data.shape[0]:
        expected = f"[{data.shape[0]}, number of scales]"
        raise ShapeError("x[1] (scales)", got=f"shape {tuple(scales.shape)}", expected=expected)
    check_scale(scales.dtype)
    return TokenFormat(data.dtype, data.shape[1], scales.dtype, scales.shape[1])


def split(x: Tokens) -> list[torch.Tensor]:
    """The planes of `x`, contiguous; a copy only where `x` was not."""
    parts = x if isinstance(x, tuple) else (x,)
    return [part.detach().contiguous() for part in parts]


def join(planes: Sequence[torch.Tensor], like: AnyTokens) -> AnyTokens:
    """Planes as the caller of `like` expects them: a tensor, or a tensor and its scales."""
    if isinstance(like, torch.Tensor):
        return planes[0]
    return planes[0], planes[1]
