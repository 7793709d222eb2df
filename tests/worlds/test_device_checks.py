"""With `CROSSDOCK_DEBUG` rows travel with their sums: what comes damaged is reported."""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossdock import BF16, FP8_BLOCK128, FP8_UE8M0, INT8_ROW, Buffer, TransportError
from crossdock.codec import decode
from crossdock.device import expert_kernels, rank_kernels
from tests.worlds.device_worlds import poison_landings
from tests.worlds.test_high_throughput import open_buffer, poison

NUM_TOKENS, HIDDEN, NUM_EXPERTS = 5, 24, 4
SENDERS = {"dispatch": "send_kernel", "combine": "back_row"}


def there_and_back(group, form, viewed, clumsy, how):
    """Rank `clumsy`, if any, leaves the last word of every row out in one of the calls."""
    checking = mock.patch.dict(os.environ, {"CROSSDOCK_DEBUG": "1"})
    with checking, careless(group.rank() == clumsy, how), open_buffer(group, "device") as buffer:
        buffer.warmup(NUM_TOKENS, 2 * HIDDEN)
        poison(group, buffer)
        poison_landings(buffer)
        try:
            return go(buffer, form, viewed)
        except TransportError as error:
            return str(error)


def careless(is_careless, how):
    """This rank sends rows of which something is missing."""
    send_kernel, back_row = rank_kernels.send_kernel, rank_kernels.back_row
    cuts = {
        "send_kernel": lambda row, *args, **rest: send_kernel(cut(row), *args, **rest),
        "back_row": lambda *args, **rest: cut(back_row(*args, **rest)),
    }
    for plan in (rank_kernels.plan_dispatch, rank_kernels.plan_combine):
        plan.cache_clear()
    if not is_careless:
        return contextlib.nullcontext()
    return mock.patch.object(rank_kernels, SENDERS[how], cuts[SENDERS[how]])


def cut(row):
    return row._replace(num_words=row.num_words - 1)


def go(buffer, form, viewed):
    topk_idx = torch.arange(NUM_TOKENS)[:, None] % NUM_EXPERTS + torch.arange(2)
    topk_idx %= NUM_EXPERTS
    given = lay_out_of(buffer, topk_idx)
    x = torch.rand(NUM_TOKENS, HIDDEN) + 1
    x = x.to(torch.bfloat16) if form == "bf16" else x
    if viewed:
        del given["num_tokens_per_rank"]
        views, _ = buffer.dispatch_views(x, NUM_TOKENS, **given)
        rows, handle = views.tokens.clone(), views.handle
    else:
        rows, _, _, _, handle, _ = buffer.dispatch(x, **given)
    back, *_ = buffer.combine(rows, handle)
    buffer.check()
    times = given["is_token_in_rank"].sum(1, keepdim=True)
    return bool(torch.equal(back, (x.float() * times).to(x.dtype)))


def lay_out_of(buffer, topk_idx):
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    return {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


@pytest.mark.parametrize(("form", "viewed"), [("bf16", False), ("fp32", False), ("bf16", True)])
def test_sums_of_sound_rows_are_right(interpreted_pool, form, viewed):
    job = (there_and_back, form, viewed, None, "")
    assert interpreted_pool.run(*job, num_ranks=2) == [True] * 2


@pytest.mark.parametrize(
    ("how", "viewed"), [("dispatch", False), ("dispatch", True), ("combine", False)]
)
def test_damaged_rows_are_reported_with_who_sent_them(interpreted_pool, how, viewed):
    told = interpreted_pool.run(there_and_back, "bf16", viewed, 1, how, num_ranks=2)
    assert "rows of ranks [1] have come damaged" in told[0]
    assert told[0].startswith(how)
    if how == "dispatch" and not viewed:  # a rank may see its own views damaged, too
        assert "rank 0 gave up" in told[1]


# Low latency.

WAYS = {
    "bf16": (BF16, {}, {"use_fp8": False}, {}),
    "fp8, UE8M0": (FP8_UE8M0, {}, {"round_scale": True, "use_ue8m0": True}, {}),
    "int8": (INT8_ROW, {"low_latency_format": "int8"}, {}, {}),
    "fp32 sums": (FP8_BLOCK128, {"low_latency_rows": "compact", "partials": "fp32"}, {}, {}),
    "logfmt": (BF16, {}, {"use_fp8": False}, {"use_logfmt": True}),
    "views": (INT8_ROW, {"low_latency_format": "int8"}, {}, {}),
}
"""How rows travel, and what a buffer, its dispatches and its combines are given for that."""

CARELESS = {"dispatch": "expert_row", "combine": "partial_sum"}
"""Where columns can be left out of what is sent, while what comes is taken whole."""


def with_low_latency(group, way, hidden, clumsy, how):
    """As `there_and_back`; also how far the results are from what they should be."""
    checking = mock.patch.dict(os.environ, {"CROSSDOCK_DEBUG": "1"})
    deadlines = {"timeout_s": 30, "first_call_timeout_s": 30}
    with ExitStack() as stack:
        stack.enter_context(checking)
        if group.rank() == clumsy:
            stack.enter_context(narrower(CARELESS[how]))
        buffer = Buffer(group, transport="device", **deadlines, **WAYS[way][1])
        stack.enter_context(buffer)
        x = torch.rand(NUM_TOKENS, hidden).bfloat16() + 1
        told, back = "", x
        for _ in range(4):  # both landing zones, and again
            try:
                back = back if told else there_and_back_again(buffer, way, x)
            except TransportError as error:
                told = str(error)
            dist.barrier(group=group)
            poison_landings(buffer)
            dist.barrier(group=group)
        return told or ((back - 2 * x).abs().max() / x.abs().max()).item()


def there_and_back_again(buffer, way, x):
    """To an expert of each of two ranks, which return what they get."""
    form, _, of_dispatch, of_combine = WAYS[way]
    topk_idx = torch.arange(NUM_TOKENS)[:, None] % 2 + torch.tensor([0, 2])
    if way == "views":
        return through_views(buffer, x, topk_idx)
    got, _, handle, *_ = buffer.low_latency_dispatch(x, topk_idx, 8, NUM_EXPERTS, **of_dispatch)
    payload, *scales = got if isinstance(got, tuple) else (got,)
    scales = [each if each.dim() == payload.dim() else each[..., None] for each in scales]
    rows, weights = decode([payload, *scales], form).bfloat16(), torch.ones(topk_idx.shape)
    back, *_ = buffer.low_latency_combine(rows, topk_idx, weights, handle, **of_combine)
    buffer.check()
    return back


def through_views(buffer, x, topk_idx):
    views, *_ = buffer.low_latency_dispatch_views(x, topk_idx, 8, num_experts=NUM_EXPERTS)
    payload, scales = views.tokens
    rows = decode([payload, scales[..., None]], INT8_ROW).bfloat16()
    back, *_ = buffer.low_latency_combine_views(rows, topk_idx, views)
    buffer.check()
    return back


def narrower(name):
    made = getattr(expert_kernels, name)

    def make(*args, **rest):
        row = made(*args, **rest)
        return row._replace(hidden=row.hidden - 8)

    return mock.patch.object(expert_kernels, name, make)


@pytest.mark.parametrize("way", WAYS)
def test_sums_of_sound_low_latency_rows_are_right(interpreted_pool, way):
    hidden = {"int8": 37, "bf16": 33, "views": 37}.get(way, 512)
    found = interpreted_pool.run(with_low_latency, way, hidden, None, "", num_ranks=2)
    assert all(isinstance(each, float) and each < 0.1 for each in found), found


@pytest.mark.parametrize("way", ["int8", "views"])
@pytest.mark.parametrize("how", CARELESS)
def test_damaged_low_latency_rows_are_reported(interpreted_pool, how, way):
    told = interpreted_pool.run(with_low_latency, way, 64, 1, how, num_ranks=2)
    assert told[0].startswith(f"low latency {how}")
    assert "rows of ranks [1] have come damaged" in told[0]
