"""Arithmetic of test programs: rounding up, comparing, fp8 with one scale per 128 columns.

What decoding programs need of it too: scales may be packed powers of two, and in any layout.

Legend: T rows, H columns, B = ceil(H / 128) blocks of columns, K selections of a row.
"""

from __future__ import annotations

import torch

__all__ = [
    "align",
    "calc_diff",
    "hash_tensor",
    "inplace_unique",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
]

_BLOCK = 128
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_SMALLEST_AMAX = 1e-4


def align(x: int, y: int) -> int:
    """The smallest multiple of `y` that is not below `x`."""
    return -(-x // y) * y


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """How far two tensors of one shape are apart: `1 - 2 sum(xy) / sum(xx + yy)` in float64.

    0 for equal ones (also when both are all zeros), 1 for unrelated ones, 2 for opposite ones.
    """
    x, y = x.to(torch.float64), y.to(torch.float64)
    size = (x * x + y * y).sum().item()
    return 1.0 - 2.0 * (x * y).sum().item() / size if size != 0.0 else 0.0


def hash_tensor(t: torch.Tensor) -> int:
    """The sum of a tensor's bytes, read as int32: equal for equal tensors, of any dtype.

    Rows that change places do not change it, so results whose rows come in any order compare too.
    """
    raw = t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(raw, (0, -raw.numel() % 4)).view(torch.int32)
    return int(words.sum(dtype=torch.int64).item())


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """`[T, H]` as fp32 `[T, B, 128]`, the last block filled up with zeros."""
    width = align(x.size(1), _BLOCK)
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, width - x.size(1)))
    return padded.view(x.size(0), width // _BLOCK, _BLOCK)


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows to e4m3 with one scale per 128 columns.

    `amax = max(|block|, 1e-4)`, `scale = amax / 448`, `q = e4m3(block * (448 / amax))`.

    Args:
        x: `[T, H]`, any floating dtype.

    Returns:
        `(q [T, H] float8_e4m3fn, scales [T, B] float32)`, both contiguous.
    """
    blocks = _blocks(x)
    amax = blocks.abs().amax(dim=2, keepdim=True).clamp(min=_SMALLEST_AMAX)
    quantised = (blocks * (_FP8_MAX / amax)).to(_FP8).flatten(1)[:, : x.size(1)]
    return quantised.contiguous(), (amax / _FP8_MAX).squeeze(2)


def _unpack_ue8m0(packed: torch.Tensor) -> torch.Tensor:
    """Int32 words of four exponent bytes each, as float32 powers of two."""
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    exponents = (packed.unsqueeze(-1) >> shifts) & 255
    return torch.bitwise_left_shift(exponents, 23).view(torch.float32).flatten(-2)


def per_token_cast_back(x_fp8: torch.Tensor, x_scales: torch.Tensor) -> torch.Tensor:
    """Undo `per_token_cast_to_fp8`, up to rounding.

    Args:
        x_fp8: `[T, H]` float8_e4m3fn.
        x_scales: `[T, B]` float32, or int32 of UE8M0 exponents packed by four; any strides. In
            another shape they are taken in order, as many for each row.

    Returns:
        `[T, H]` bfloat16.
    """
    if not x_fp8.numel():
        return x_fp8.to(torch.bfloat16)
    scales = _unpack_ue8m0(x_scales) if x_scales.dtype == torch.int32 else x_scales
    scales = scales.reshape(x_fp8.size(0), -1)
    blocks = _blocks(x_fp8)
    rows = (blocks * scales[:, : blocks.size(1), None]).flatten(1)[:, : x_fp8.size(1)]
    return rows.to(torch.bfloat16).contiguous()


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Keep each value of a row once, largest first, and fill the rest of the row with -1.

    Example (num_slots=4): [[3, 1, 3, -1], [0, 0, 0, 2]] -> [[3, 1, -1, -1], [2, 0, -1, -1]]

    Args:
        x: `[T, K]` integers below `num_slots`; negative ones count as nothing. Overwritten.
        num_slots: how many different values there are.
    """
    present = torch.zeros((x.size(0), num_slots + 1), dtype=torch.bool, device=x.device)
    present.scatter_(1, x.masked_fill(x < 0, num_slots).to(torch.int64), True)
    values = torch.arange(num_slots, dtype=x.dtype, device=x.device).expand(x.size(0), -1)
    kept = values.masked_fill(~present[:, :num_slots], -1).sort(dim=1, descending=True).values
    width = min(num_slots, x.size(1))
    x.fill_(-1)
    x[:, :width] = kept[:, :width]
