"""Kinds of low-latency calls: found out once for all calls of a kind, and refused every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crossdock.errors import ConfigError, HandleError, ShapeError
from crossdock.formats import BF16, FP8_BLOCK128, FP8_UE8M0
from crossdock.low_latency_arguments import Kinds, LowLatencyOptions
from crossdock.shapes import meta

X, IDX = torch.zeros((3, 512), dtype=torch.bfloat16), torch.zeros((3, 2), dtype=torch.int64)
WEIGHTS, COUNTS = torch.zeros((3, 2)), torch.zeros(2, dtype=torch.int32)
SLABS = torch.zeros((2, 8, 512), dtype=torch.bfloat16)
INFO, RANGES = torch.zeros((2, 8), dtype=torch.int32), torch.zeros((2, 2), dtype=torch.int64)


@pytest.fixture
def kinds() -> Kinds:
    return Kinds(LowLatencyOptions(), num_ranks=2)


def dispatched(**changed: Any) -> tuple[Any, ...]:
    """The arguments of a dispatch on 2 ranks with 4 experts."""
    given = {
        "x": meta(X),
        "topk_idx": meta(IDX),
        "topk_weights": None,
        "waits": None,
        "received": meta(COUNTS),
        "num_slots": 4,
        "num_experts": 4,
        "use_fp8": True,
        "round_scale": False,
        "use_ue8m0": False,
    }
    return tuple((given | changed).values())


def combined(**changed: Any) -> tuple[Any, ...]:
    """The arguments of a combine of what such a dispatch brings."""
    given = {
        "x": meta(SLABS),
        "topk_idx": meta(IDX),
        "topk_weights": meta(WEIGHTS),
        "out": None,
        "waits": None,
        "use_logfmt": False,
        "src_info": meta(INFO),
        "layout_range": RANGES.shape,
        "num_slots": 4,
        "hidden": 512,
        "num_experts": 4,
    }
    return tuple((given | changed).values())


def test_equal_calls_are_of_one_kind(kinds: Kinds) -> None:
    assert kinds.dispatch(dispatched()) is kinds.dispatch(dispatched(x=meta(X.clone())))
    assert kinds.combine(combined()) is kinds.combine(combined(x=meta(SLABS.clone())))
    for other in (X[:2], X.to("meta")):
        assert kinds.dispatch(dispatched(received=None)) is not kinds.dispatch(
            dispatched(received=None, x=meta(other), topk_idx=meta(IDX[: len(other)]))
        )


@pytest.mark.parametrize(
    ("switches", "form"),
    [
        ({}, FP8_BLOCK128),
        ({"use_fp8": False}, BF16),
        ({"round_scale": True, "use_ue8m0": True}, FP8_UE8M0),
    ],
)
def test_a_kind_of_dispatch_knows_its_sizes_and_form(kinds: Kinds, switches, form) -> None:
    kind = kinds.dispatch(dispatched(**switches))
    assert (kind.num_tokens, kind.hidden, kind.num_topk) == (3, 512, 2)
    assert (kind.num_slots, kind.num_experts, kind.compact) == (4, 4, False)
    assert kind.form == form


@pytest.mark.parametrize("compact", [False, True])
def test_a_kind_of_combine_knows_its_sizes_and_layouts(kinds: Kinds, compact: bool) -> None:
    changed = {"src_info": meta(INFO.flatten()), "x": meta(SLABS[0])} if compact else {}
    kind = kinds.combine(combined(**changed))
    assert (kind.num_tokens, kind.hidden, kind.num_topk, kind.num_rows) == (3, 512, 2, 16)
    assert (kind.compact, kind.x_is_compact) == (compact, compact)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"x": None}, ShapeError),
        ({"x": meta(X.float())}, ShapeError),
        ({"topk_idx": meta(IDX[:2])}, ShapeError),
        ({"topk_weights": meta(WEIGHTS[:2])}, ShapeError),
        ({"received": meta(COUNTS[:1])}, ShapeError),
        ({"num_slots": 2}, ShapeError),
        ({"num_experts": 5}, ShapeError),
        ({"use_ue8m0": True}, ConfigError),
    ],
)
def test_wrong_dispatches_are_refused_every_time(kinds: Kinds, changed, error) -> None:
    for _ in range(2):
        with pytest.raises(error):
            kinds.dispatch(dispatched(**changed))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"x": meta(SLABS[:1])}, ShapeError),
        ({"topk_idx": meta(IDX.int())}, ShapeError),
        ({"topk_weights": None}, ShapeError),
        ({"out": meta(X[:2])}, ShapeError),
        ({"layout_range": RANGES[:1].shape}, HandleError),
        ({"src_info": meta(INFO[:1])}, HandleError),
    ],
)
def test_wrong_combines_are_refused_every_time(kinds: Kinds, changed, error) -> None:
    for _ in range(2):
        with pytest.raises(error):
            kinds.combine(combined(**changed))
