"""What callers may pass: the choices of low-latency calls."""

from __future__ import annotations

import pytest
import torch

from crossdock import (
    BF16,
    FP8_BLOCK128,
    FP8_ROUND_SCALE,
    FP8_UE8M0,
    INT8_ROW,
    ConfigError,
    ScaleRule,
    ShapeError,
    TokenFormat,
)
from crossdock.arguments import checked_wait_stats
from crossdock.low_latency_arguments import LowLatencyOptions

OWN = TokenFormat("own", torch.float8_e5m2, ScaleRule.QUOTIENT, block=64)


@pytest.mark.parametrize(
    ("form", "switches", "chosen"),
    [
        ("fp8", (True, False, False), FP8_BLOCK128),
        ("fp8", (True, True, False), FP8_ROUND_SCALE),
        ("fp8", (True, True, True), FP8_UE8M0),
        ("int8", (True, False, False), INT8_ROW),
        ("bf16", (True, False, False), BF16),
        (OWN, (True, False, False), OWN),
        (TokenFormat(**vars(FP8_BLOCK128)), (True, True, False), FP8_ROUND_SCALE),
        ("fp8", (False, False, False), BF16),
        ("int8", (False, True, True), BF16),
        (OWN, (False, False, True), BF16),
    ],
)
def test_switches_choose_a_format(
    form: str | TokenFormat, switches: tuple[bool, bool, bool], chosen: TokenFormat
) -> None:
    use_fp8, round_scale, use_ue8m0 = switches
    options = LowLatencyOptions(form)
    found = options.chosen(use_fp8=use_fp8, round_scale=round_scale, use_ue8m0=use_ue8m0)
    assert found == chosen


@pytest.mark.parametrize(
    ("form", "round_scale", "use_ue8m0", "text"),
    [
        ("fp8", False, True, "needs round_scale"),
        ("int8", True, False, "the format is int8"),
        (OWN, True, True, "the format is own"),
    ],
)
def test_switches_that_do_not_go_together(
    form: str | TokenFormat, round_scale: bool, use_ue8m0: bool, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        LowLatencyOptions(form).chosen(use_fp8=True, round_scale=round_scale, use_ue8m0=use_ue8m0)


def test_waits_are_counted_in_a_row_or_in_a_table() -> None:
    row, table = (torch.zeros(shape, dtype=torch.int64) for shape in ((3,), (3, 3)))
    assert checked_wait_stats("waits", None, rank=1, num_ranks=3) is None
    assert checked_wait_stats("waits", row, rank=1, num_ranks=3) is row
    part = checked_wait_stats("waits", table, rank=1, num_ranks=3)
    assert part is not None
    part += 7
    assert table.tolist() == [[0, 0, 0], [7, 7, 7], [0, 0, 0]]
    for wrong in (row.int(), row[:2], table[:2]):
        with pytest.raises(ShapeError, match="waits"):
            checked_wait_stats("waits", wrong, rank=1, num_ranks=3)


def test_a_format_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="float16"):
        TokenFormat("half", torch.float16)
    with pytest.raises(ConfigError, match="scale rule"):
        TokenFormat("bare", torch.int8)
    with pytest.raises(ConfigError, match="scale rule"):
        TokenFormat("scaled", torch.bfloat16, ScaleRule.QUOTIENT)
    with pytest.raises(ShapeError, match="640"):
        FP8_UE8M0.row(640)
    assert FP8_UE8M0.row(1024).num_scales == 2
    assert OWN.row(640).num_scales == 10
