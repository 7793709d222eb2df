"""Kernels around the device functions of `quantize`, their launchers, and what they compile to."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crossdock.formats import ELEMENT_CODES, TokenFormat
from crossdock.logfmt import log_row
from crossdock.ops.triton import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 0xEE
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@triton.jit
def encode_rows(
    x,
    codes,
    scales,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    RULE: tl.constexpr,
    ELEMENT: tl.constexpr,
    MIN_AMAX: tl.constexpr,
    USE_CASTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block, lane = tl.arange(0, BLOCKS), tl.arange(0, WIDTH)
    column = block[:, None] * BLOCK + lane[None, :]
    real = (lane < BLOCK)[None, :] & (column < H)
    values = tl.load(x + row * H + column, mask=real, other=0.0).to(tl.float32)
    found, scale = quantize.encode_row(values, RULE, ELEMENT, MIN_AMAX, USE_CASTS)
    tl.store(codes + row * H + column, found, mask=real)
    if RULE == quantize.UE8M0:
        words = quantize.pack_exponents(scale)
        word = tl.arange(0, words.shape[0])
        NUM_WORDS: tl.constexpr = (H // BLOCK + 3) // 4
        tl.store(scales + row * NUM_WORDS + word, words, mask=word < NUM_WORDS)
    else:
        tl.store(scales + row * (H // BLOCK) + block, scale, mask=block * BLOCK < H)


@triton.jit
def pack_row(exponents, words, BLOCKS: tl.constexpr):
    found = quantize.pack_exponents(tl.load(exponents + tl.arange(0, BLOCKS)))
    tl.store(words + tl.arange(0, found.shape[0]), found)


@triton.jit
def encode_log_rows(x, packed, ranges, H: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    values = tl.load(x + row * H + column, mask=column < H, other=0.0).to(tl.float32)
    to_bytes = packed + row * (5 * ((H + 3) // 4))
    quantize.store_log(to_bytes, ranges + row * (2 * ((H + 63) // 64)), values, H)


@triton.jit
def decode_log_rows(packed, ranges, out, H: tl.constexpr, BLOCKS: tl.constexpr, FLAT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    from_bytes = packed + row * (5 * ((H + 3) // 4))
    from_ranges = ranges + row * (2 * ((H + 63) // 64))
    if FLAT:
        column = tl.arange(0, BLOCKS * 64)
        top, step = quantize.load_ranges(from_ranges, column // 64, H)
    else:
        block = tl.arange(0, BLOCKS)
        column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
        top, step = quantize.load_ranges(from_ranges, block, H)
        top, step = top[:, None], step[:, None]
    values = quantize.load_log(from_bytes, column, top, step, H)
    tl.store(out + row * H + column, values, mask=column < H)


def token_constants(form: TokenFormat, hidden: int, *, use_casts: bool) -> dict[str, Any]:
    block = form.block or hidden
    return {
        "H": hidden,
        "BLOCKS": triton.next_power_of_2(hidden // block),
        "BLOCK": block,
        "WIDTH": triton.next_power_of_2(block),
        "RULE": form.rule.value,
        "ELEMENT": ELEMENT_CODES[form.element],
        "MIN_AMAX": form.min_amax,
        "USE_CASTS": use_casts,
    }


def log_constants(hidden: int) -> dict[str, Any]:
    return {"H": hidden, "BLOCKS": triton.next_power_of_2(triton.cdiv(hidden, 64))}


def poisoned(num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[T + 1, width], of which the last row is for `checked`."""
    size = (num_rows + 1, width * dtype.itemsize)
    return torch.full(size, POISON, dtype=torch.uint8, device=DEVICE).view(dtype)


def checked(plane: torch.Tensor) -> torch.Tensor:
    """The rows that were to be written; the one behind them was not."""
    if (plane[-1].view(torch.uint8) != POISON).any():
        raise AssertionError("a kernel has written beyond its row")
    return plane[:-1].cpu()


def encode(x: torch.Tensor, form: TokenFormat, *, use_casts: bool = False) -> list[torch.Tensor]:
    """What `codec.encode` gives, codes as uint8."""
    (num_rows, hidden), row = x.shape, form.row(x.shape[1])
    codes = poisoned(num_rows, hidden, torch.uint8)
    scales = poisoned(num_rows, row.num_scales, row.scale)
    constants = token_constants(form, hidden, use_casts=use_casts)
    encode_rows[(num_rows,)](x.to(DEVICE).contiguous(), codes, scales, **constants)
    return [checked(codes), checked(scales)]


def pack(exponents: torch.Tensor) -> torch.Tensor:
    words = torch.empty(max(len(exponents) // 4, 1), dtype=torch.int32, device=DEVICE)
    pack_row[(1,)](exponents.to(DEVICE), words, BLOCKS=len(exponents))
    return words.cpu()


def encode_log(x: torch.Tensor) -> list[torch.Tensor]:
    (num_rows, hidden), row = x.shape, log_row(x.shape[1])
    packed = poisoned(num_rows, row.hidden, torch.uint8)
    ranges = poisoned(num_rows, row.num_scales, torch.float32)
    encode_log_rows[(num_rows,)](x.to(DEVICE).contiguous(), packed, ranges, **log_constants(hidden))
    return [checked(packed), checked(ranges)]


def decode_log(planes: list[torch.Tensor], hidden: int, *, flat: bool = False) -> torch.Tensor:
    packed, ranges = (plane.to(DEVICE) for plane in planes)
    out = poisoned(len(packed), hidden, torch.float32)
    constants = log_constants(hidden)
    decode_log_rows[(len(packed),)](packed, ranges, out, **constants, FLAT=flat)
    return checked(out)


def compile_tokens(
    capability: int, form: TokenFormat, hidden: int, *, use_casts: bool = False
) -> dict[str, str]:
    scale = TYPES[form.row(hidden).scale]
    pointers = {"x": "*bf16", "codes": "*u8", "scales": scale}
    constants = token_constants(form, hidden, use_casts=use_casts)
    return compiled(capability, encode_rows, pointers, constants)


def compile_log_encoding(capability: int, hidden: int) -> dict[str, str]:
    pointers = {"x": "*fp32", "packed": "*u8", "ranges": "*fp32"}
    return compiled(capability, encode_log_rows, pointers, log_constants(hidden))


def compile_log_decoding(capability: int, hidden: int, *, flat: bool) -> dict[str, str]:
    pointers = {"packed": "*u8", "ranges": "*fp32", "out": "*fp32"}
    constants = {**log_constants(hidden), "FLAT": flat}
    return compiled(capability, decode_log_rows, pointers, constants)


def compiled(
    capability: int, kernel: Any, pointers: dict[str, str], constants: dict[str, Any]
) -> dict[str, str]:
    """The PTX of a kernel with 8 warps and aligned pointers, and what resources its code takes."""
    index = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature={**pointers, **dict.fromkeys(constants, "constexpr")},
        constexprs={index[name]: value for name, value in constants.items()},
        attrs={index[name]: [["tt.divisibility", 16]] for name in pointers},
    )
    target = GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target=target, options={"num_warps": 8})
    return {"ptx": found.asm["ptx"], "usage": usage_of(found.asm["cubin"])}


def usage_of(cubin: bytes) -> str:
    """Such as `REG:54 STACK:0 SHARED:1024 LOCAL:0`; registers that spill take stack or local."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"REG:.*LOCAL:\d+", told).group(0)
