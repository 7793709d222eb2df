"""With `CROSSDOCK_DEBUG` rows travel with their sums: what comes damaged is reported."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import pytest
import torch

from crossdock import TransportError
from crossdock.device import rank_kernels
from tests.worlds.device_worlds import poison_landings
from tests.worlds.test_high_throughput import open_buffer, poison

NUM_TOKENS, HIDDEN, NUM_EXPERTS = 5, 24, 4
SENDERS = {"dispatch": "send_kernel", "combine": "back_row"}


def there_and_back(group, form, clumsy, how):
    """Rank `clumsy`, if any, leaves the last word of every row out in one of the calls."""
    checking = mock.patch.dict(os.environ, {"CROSSDOCK_DEBUG": "1"})
    with checking, careless(group.rank() == clumsy, how), open_buffer(group, "device") as buffer:
        buffer.warmup(NUM_TOKENS, 2 * HIDDEN)
        poison(group, buffer)
        poison_landings(buffer)
        try:
            return go(buffer, form)
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


def go(buffer, form):
    topk_idx = torch.arange(NUM_TOKENS)[:, None] % NUM_EXPERTS + torch.arange(2)
    topk_idx %= NUM_EXPERTS
    given = lay_out_of(buffer, topk_idx)
    x = torch.rand(NUM_TOKENS, HIDDEN) + 1
    x = x.to(torch.bfloat16) if form == "bf16" else x
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


@pytest.mark.parametrize("form", ["bf16", "fp32"])
def test_sums_of_sound_rows_are_right(interpreted_pool, form):
    job = (there_and_back, form, None, "")
    assert interpreted_pool.run(*job, num_ranks=2) == [True] * 2


@pytest.mark.parametrize("how", SENDERS)
def test_damaged_rows_are_reported_with_who_sent_them(interpreted_pool, how):
    told = interpreted_pool.run(there_and_back, "bf16", 1, how, num_ranks=2)
    assert "rows of ranks [1] have come damaged" in told[0]
    assert told[0].startswith(how)
    if how == "dispatch":  # after the last call there is nothing left to wait for
        assert "rank 0 gave up" in told[1]
