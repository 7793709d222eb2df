"""Two thousand rounds without a wrong row and without a growing process.

Every rank draws the routing of all ranks from one seed, so that each can judge what it received.
The full oracle is too slow for every round; it judges a sample of them, and in those rounds also
the quick expectation that judges all the others.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from crossdock import Buffer, reference
from crossdock.cases import Routing, origin_rows
from tests.worlds.checks import Received, Returned, combine_faults, difference, dispatch_faults

NUM_RANKS, NUM_EXPERTS, NUM_TOPK, HIDDEN = 4, 16, 4, 64
PHASES = (8, 24, 64, 160)
"""Most tokens of a rank; each phase is longer than what the buffer has room for so far."""


class Soak(NamedTuple):
    """What one rank saw: faults, and what it held round after round, when grown and at the end."""

    faults: list[str]
    num_judged: int
    sizes: list[str]
    grown: dict
    final: dict


def most_tokens(index, num_rounds):
    """Grows in four phases during the first third, and stays."""
    return PHASES[min(3, index * 12 // num_rounds)]


def draw_routing(index, num_rounds) -> Routing:
    generator = torch.Generator().manual_seed(index)
    most = most_tokens(index, num_rounds)
    idxs = []
    for _ in range(NUM_RANKS):
        num_tokens = int(torch.randint(0, most + 1, (), generator=generator))
        idx = torch.randint(0, NUM_EXPERTS, (num_tokens, NUM_TOPK), generator=generator)
        empty = torch.rand(idx.shape, generator=generator) < 0.2
        idxs.append(idx.masked_fill_(empty, -1))
    return Routing(idxs, NUM_EXPERTS)


def draw_rows(tables, index, routing):
    """Every rank's rows: they name rank and token, and in the last column the round."""
    rows = [table[: len(idx)].clone() for table, idx in zip(tables, routing.topk_idxs, strict=True)]
    for each in rows:
        each[:, -1] = index % 256
    return rows


def answer(rows, rank):
    """Stands for the experts of a rank; its noise keeps roundings from being all alike."""
    generator = torch.Generator().manual_seed(rank)
    return rows * torch.randn(HIDDEN, generator=generator).bfloat16()


def expect(xs, routing, rank):
    """What `rank` must receive and get back, all rows at once."""
    idx, table = torch.cat(routing.topk_idxs), torch.cat(xs)
    owner = torch.where(idx < 0, -1, idx // (NUM_EXPERTS // NUM_RANKS))
    presence = (owner[:, :, None] == torch.arange(NUM_RANKS)).any(1)
    here = presence[:, rank]
    local = torch.where(owner == rank, idx % (NUM_EXPERTS // NUM_RANKS), -1)[here]
    mine = torch.split(presence, [len(x) for x in xs])[rank]
    addends = torch.stack([answer(xs[rank], peer).double() for peer in range(NUM_RANKS)], 1)
    addends *= mine[:, :, None]
    returned = reference.ReferenceCombine(addends.sum(1), None, addends.abs().sum(1))
    return table[here], local, returned, mine.sum(1)


def nap(naps, rank):
    """Mostly nothing, sometimes a little, rarely long enough for all others to wait."""
    chance = naps.random()
    if chance < 0.1:
        time.sleep(naps.random() * (0.02 if chance < 0.01 else 0.002))


def held(buffer):
    """What this process holds: by the buffer's own count, and by the system's."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "buffer": repr(buffer),
        "resident": num_pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "shared mappings": Path("/proc/self/maps").read_text().count("memfd:"),
    }


def soak(group, transport, num_rounds, judge_every) -> Soak:
    rank, naps = group.rank(), random.Random(group.rank())
    tables = [
        origin_rows(peer, PHASES[-1], HIDDEN, dtype=torch.bfloat16) for peer in range(NUM_RANKS)
    ]
    faults, num_judged, sizes, grown = [], 0, [], {}
    with Buffer(group, transport=transport, timeout_s=30) as buffer:
        for index in range(num_rounds):
            routing = draw_routing(index, num_rounds)
            xs = draw_rows(tables, index, routing)
            got, back = go_once(buffer, xs[rank], routing, lambda: nap(naps, rank))
            found = judge(got, back, xs, routing, rank)
            if index % judge_every == 0:
                num_judged += 1
                found += judge_fully(got, back, xs, routing, rank)
            faults += [f"round {index}: {fault}" for fault in found]
            if repr(buffer) not in sizes:
                sizes.append(repr(buffer))
            if index == num_rounds // 2:
                grown = held(buffer)
        return Soak(faults[:20], num_judged, sizes, grown, held(buffer))


def go_once(buffer, x, routing, pause):
    topk_idx = routing.topk_idxs[buffer.rank]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    pause()
    recv_x, recv_idx, _, counts, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
    )
    pause()
    back, _, _ = buffer.combine(answer(recv_x, buffer.rank), handle)
    return Received(recv_x, recv_idx, None, counts, handle[0], handle[3]), Returned(back, None)


def judge(got, back, xs, routing, rank):
    rows, local, returned, num_addends = expect(xs, routing, rank)
    faults = [difference(got.x, rows), difference(got.topk_idx, local)]
    return [*filter(None, faults), *combine_faults([back], [returned], [num_addends])]


def judge_fully(got, back, xs, routing, rank):
    """Compares with the oracle, and so does the quick expectation."""
    received = reference.dispatch(xs, routing.topk_idxs, num_experts=NUM_EXPERTS)
    answers = [answer(each.recv_x, peer) for peer, each in enumerate(received)]
    returned = reference.combine(answers, routing.topk_idxs, NUM_EXPERTS)
    rows, local, quick, num_addends = expect(xs, routing, rank)
    faults = dispatch_faults([got], [received[rank]])
    faults += combine_faults([back], [returned[rank]], [num_addends])
    faults += [difference(rows, received[rank].recv_x), difference(local, received[rank][1])]
    faults += [difference(quick.combined, returned[rank].combined)]
    faults += [difference(quick.magnitude, returned[rank].magnitude)]
    return [fault for fault in faults if fault]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("transport", "num_rounds", "judge_every"), [("one_sided", 2000, 100), ("collective", 300, 30)]
)
def test_a_long_run_stays_right_and_small(pool, transport, num_rounds, judge_every):
    job = (soak, transport, num_rounds, judge_every)
    for seen in pool.run(*job, num_ranks=NUM_RANKS, timeout_s=180):
        assert seen.faults == []
        assert seen.num_judged == num_rounds // judge_every
        if transport == "one_sided":
            assert len(seen.sizes) >= len(PHASES), "the buffer was to grow several times"
            assert seen.final["shared mappings"] > 0
        growth = seen.final.pop("resident") - seen.grown.pop("resident")
        assert growth < 2 << 20
        assert seen.final == seen.grown
