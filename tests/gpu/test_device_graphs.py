"""Calls in CUDA graphs, replayed a thousand times while tokens and choices change under them.

Every rank draws what all ranks bring to a replay from its number, so that each can judge what it
got. Now and then a replay is judged by the oracle; others must have the bits of the same calls made
eagerly, on another buffer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from crossdock import Buffer, reference
from crossdock import reference_low_latency as oracle
from crossdock.cases import Routing, origin_rows
from tests.gpu.adapter import NEEDS_GPUS, spin
from tests.worlds.checks import Received, Returned, combine_faults, difference, dispatch_faults
from tests.worlds.low_latency_checks import Form, Slabs, exact_sums, slab_faults, sum_faults

pytestmark = NEEDS_GPUS

NUM_REPLAYS, JUDGE_EVERY, COMPARE_EVERY = 1000, 50, 10
NUM_LOCAL = 4


class Shape(NamedTuple):
    """What does not change from replay to replay.

    Attributes:
        num_tokens, hidden, num_topk: T, H, K.
        name: format of a low-latency dispatch.
        rows: its layout.
    """

    num_tokens: int
    hidden: int
    num_topk: int
    name: str = "bf16"
    rows: str = "slab"

    @property
    def form(self) -> Form:
        return Form(self.name, self.rows, self.num_tokens, self.hidden)


class Brought(NamedTuple):
    """What all ranks bring to one replay."""

    xs: list[torch.Tensor]
    routing: Routing
    weights: list[torch.Tensor]

    def on_gpu(self, rank: int) -> list[torch.Tensor]:
        mine = (self.xs[rank], self.routing.topk_idxs[rank], self.weights[rank])
        return [tensor.cuda() for tensor in mine]


def bring(index: int, shape: Shape, num_ranks: int) -> Brought:
    """Choices with gaps, of whole tokens too, and with experts that are named twice."""
    generator = torch.Generator().manual_seed(index)
    size, experts = (shape.num_tokens, shape.num_topk), NUM_LOCAL * num_ranks
    xs, idxs, weights = [], [], []
    for rank in range(num_ranks):
        rows = origin_rows(
            rank, 2 * index % 1000 + shape.num_tokens, shape.hidden, dtype=torch.bfloat16
        )
        xs.append(rows[-shape.num_tokens :].contiguous())
        idx = torch.randint(0, experts, size, generator=generator)
        gone = torch.rand(size, generator=generator) < 0.2
        gone[: index % shape.num_tokens] |= index % 7 == 0
        idxs.append(idx.masked_fill(gone, -1))
        weights.append(torch.rand(size, generator=generator))
    return Brought(xs, Routing(idxs, experts), weights)


def experts(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Exact in bf16, and another one on each rank."""
    return rows * -(2.0**rank)


# Low latency.


def low_latency(buffer: Buffer, shape: Shape, given: list[torch.Tensor]) -> Any:
    x, idx, weights = given
    rows, count, handle, *_ = buffer.low_latency_dispatch(
        x, idx, shape.num_tokens, NUM_LOCAL * buffer.group_size, use_fp8=shape.name != "bf16"
    )
    data = rows[0] if isinstance(rows, tuple) else rows
    answers = experts(data.to(torch.bfloat16), buffer.rank)
    back, *_ = buffer.low_latency_combine(answers, idx, weights, handle)
    return rows, count, handle, back


def judge_low_latency(made: Any, shape: Shape, brought: Brought, rank: int) -> list[str]:
    rows, count, handle, back = each_on_cpu(made)
    routing = brought.routing
    right = oracle.dispatch(
        brought.xs, routing.topk_idxs, num_experts=routing.num_experts, format=shape.name
    )
    faults = slab_faults([Slabs(rows, count, handle)], [right[rank]], shape.form, routing)
    answers = [
        [experts(part.to(torch.bfloat16), peer) for part in each.rows]
        for peer, each in enumerate(right)
    ]
    exact = exact_sums(answers, routing, brought.weights)
    return faults + sum_faults([back], [exact[rank]])


def views(buffer: Buffer, shape: Shape, given: list[torch.Tensor]) -> Any:
    """Rows that stay where they land, and go back by being read there."""
    x, idx, _ = given
    landed, *_ = buffer.low_latency_dispatch_views(
        x, idx, shape.num_tokens, num_experts=NUM_LOCAL * buffer.group_size, use_fp8=False
    )
    written = buffer.get_next_low_latency_views_buffer(landed, shape.hidden)
    written.copy_(experts(landed.tokens, buffer.rank))
    back, *_ = buffer.low_latency_combine_views(written, idx, landed, zero_copy=True)
    return landed.tokens, landed.topk_idx, landed.src_idx, back


def judge_views(made: Any, shape: Shape, brought: Brought, rank: int) -> list[str]:
    tokens, idx, src_idx, back = each_on_cpu(made)
    owners = [chosen // NUM_LOCAL for chosen in brought.routing.topk_idxs]
    faults = []
    for src, (owner, chosen) in enumerate(zip(owners, brought.routing.topk_idxs, strict=True)):
        there = (owner == rank).any(1)
        wanted = {
            "rows": (tokens[src][there], brought.xs[src][there]),
            "choices": (idx[src], torch.where(owner == rank, chosen - rank * NUM_LOCAL, -1)),
            "which": (src_idx[src], torch.where(there, torch.arange(len(there)), -1).int()),
        }
        for what, (got, right) in wanted.items():
            faults += [f"{what} of {src}: {why}" for why in [difference(got, right)] if why]
    total = torch.zeros(back.shape)
    for peer in range(len(owners)):
        here = (owners[rank] == peer).any(1)
        total[here] += experts(brought.xs[rank][here], peer).float()
    return [*faults, *filter(None, [difference(back, total.bfloat16())])]


# High throughput, with room for the worst case.


def padded(buffer: Buffer, shape: Shape, given: list[torch.Tensor]) -> Any:
    x, idx, weights, in_rank, per_expert = given
    rows, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
        num_worst_tokens=shape.num_tokens * buffer.group_size,
    )
    back, back_weights, _ = buffer.combine(
        experts(rows, buffer.rank), handle, topk_weights=recv_weights
    )
    return rows, recv_idx, recv_weights, counts, tuple(handle), back, back_weights


def judge_padded(made: Any, shape: Shape, brought: Brought, rank: int) -> list[str]:
    rows, idx, weights, counts, handle, back, back_weights = each_on_cpu(made)
    topk_idxs, num_experts = brought.routing
    right = reference.dispatch(brought.xs, topk_idxs, brought.weights, num_experts=num_experts)
    num = len(right[rank].recv_src_idx)
    got = Received(rows[:num], idx[:num], weights[:num], [], handle[0], handle[3][:num])
    wanted = right[rank]._replace(num_recv_tokens_per_expert=[])
    faults = dispatch_faults([got], [wanted])
    faults += [] if (idx[num:] == -1).all() and not rows[num:].any() else ["padding"]
    faults += [f"counts {counts}"] if counts else []
    exact = reference.combine(
        [experts(each.recv_x, peer) for peer, each in enumerate(right)],
        topk_idxs,
        num_experts,
        topk_weights=[each.recv_topk_weights for each in right],
    )
    layout = reference.layout(topk_idxs[rank], num_experts, len(topk_idxs))
    addends = layout.is_token_in_rank.sum(1)
    return faults + combine_faults([Returned(back, back_weights)], [exact[rank]], [addends])


def each_on_cpu(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return made.cpu()
    if isinstance(made, (tuple, list)):
        return tuple(each_on_cpu(part) for part in made)
    return made


class Kind(NamedTuple):
    """Calls, and who judges them."""

    calls: Callable[..., Any]
    judge: Callable[..., list[str]]
    prepare: Callable[[Brought, int], list[torch.Tensor]]


def with_layout(brought: Brought, rank: int) -> list[torch.Tensor]:
    """What a padded dispatch needs to be given: where tokens go, too."""
    idxs, num_experts = brought.routing
    layout = reference.layout(idxs[rank], num_experts, len(idxs))
    there = (layout.is_token_in_rank, layout.num_tokens_per_expert)
    return [*brought.on_gpu(rank), *(tensor.cuda() for tensor in there)]


KINDS = {
    "low latency": Kind(low_latency, judge_low_latency, Brought.on_gpu),
    "views": Kind(views, judge_views, Brought.on_gpu),
    "padded": Kind(padded, judge_padded, with_layout),
}


def open_buffer(group: Any, shape: Shape) -> Buffer:
    buffer = Buffer(
        group,
        transport="device",
        low_latency_rows=shape.rows,
        timeout_s=20,
        first_call_timeout_s=300,
    )
    buffer.warmup(shape.num_tokens, shape.hidden)
    return buffer


def recording(graph: torch.cuda.CUDAGraph) -> Any:
    """Other threads, NCCL's among them, may do what they like meanwhile."""
    return torch.cuda.graph(graph, capture_error_mode="thread_local")


class Graph:
    """Calls on tensors that stay where they are, recorded once.

    Args:
        buffer: what makes the calls.
        shape: their sizes.
        kind: which they are.
    """

    def __init__(self, buffer: Buffer, shape: Shape, kind: Kind) -> None:
        self._given = kind.prepare(bring(0, shape, buffer.group_size), buffer.rank)
        kind.calls(buffer, shape, self._given)  # makes room, and compiles
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with recording(self._graph):
            self._made = kind.calls(buffer, shape, self._given)

    def replay(self, given: list[torch.Tensor]) -> Any:
        """The results for what this rank brings, in the memory that they always have."""
        for mine, new in zip(self._given, given, strict=True):
            mine.copy_(new)
        self._graph.replay()
        return self._made


def replay(group: Any, name: str, shape: Shape, num_replays: int) -> list[str]:
    """One graph; now and then its calls are made eagerly on the same buffer."""
    rank, kind, faults = group.rank(), KINDS[name], []
    whims = random.Random(rank)
    buffer, eager = open_buffer(group, shape), open_buffer(group, shape)
    graph = Graph(buffer, shape, kind)
    for index in range(1, num_replays + 1):
        brought = bring(index, shape, group.size())
        given = kind.prepare(brought, rank)
        if whims.random() < 0.2:
            spin(whims.random() * 300)
        made = graph.replay(given)
        if index % JUDGE_EVERY == 0:
            faults += [f"{index}: {each}" for each in kind.judge(made, shape, brought, rank)]
        if index % COMPARE_EVERY == 0:
            same = kind.calls(eager if index % 20 else buffer, shape, given)
            faults += [f"{index}: {each}" for each in differences(made, same, kind)]
    torch.cuda.synchronize()
    buffer.check()
    return faults[:20]


def differences(made: Any, same: Any, kind: Kind) -> list[str]:
    """What went back, and how much came: other memory may differ where nothing is defined."""
    back = -2 if kind.calls is padded else -1
    return list(filter(None, [difference(made[back].cpu(), same[back].cpu())]))


SHAPES = [
    ("low latency", Shape(16, 512, 4)),
    ("low latency", Shape(7, 1024, 8, "fp8")),
    ("low latency", Shape(33, 640, 2, "fp8", "compact")),
    ("views", Shape(16, 512, 4)),
    ("views", Shape(9, 67, 2)),
    ("padded", Shape(32, 512, 4)),
    ("padded", Shape(5, 67, 2)),
]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_thousand_replays_are_right(pool: Any, num_ranks: int, name: str, shape: Shape) -> None:
    found = pool.run(replay, name, shape, NUM_REPLAYS, num_ranks=num_ranks, timeout_s=200)
    assert found == [[]] * num_ranks


def replay_two(group: Any, names: list[str], shapes: list[Shape], num_replays: int) -> list[str]:
    """Two graphs of one buffer, in an order that all ranks keep to."""
    rank, faults, plan = group.rank(), [], random.Random(0)
    buffer = open_buffer(group, shapes[0])
    for shape in shapes:
        buffer.warmup(shape.num_tokens, shape.hidden)
    pairs = list(zip(names, shapes, strict=True))
    for name, shape in pairs:  # neither may outgrow what the other one is recorded with
        given = KINDS[name].prepare(bring(0, shape, group.size()), rank)
        KINDS[name].calls(buffer, shape, given)
    graphs = [Graph(buffer, shape, KINDS[name]) for name, shape in pairs]
    for index in range(1, num_replays + 1):
        which = index % 2 if index < num_replays // 2 else plan.randrange(2)
        (name, shape), graph = pairs[which], graphs[which]
        brought = bring(index, shape, group.size())
        made = graph.replay(KINDS[name].prepare(brought, rank))
        if index % JUDGE_EVERY in (0, 1):
            judge = KINDS[name].judge
            faults += [f"{index}: {each}" for each in judge(made, shape, brought, rank)]
    torch.cuda.synchronize()
    buffer.check()
    return faults[:20]


PAIRS = {
    "two of low latency": (["low latency"] * 2, [Shape(16, 512, 4), Shape(9, 512, 4)]),
    "padded and low latency": (["padded", "low latency"], [Shape(24, 512, 4), Shape(16, 512, 4)]),
    "views and low latency": (["views", "low latency"], [Shape(16, 512, 4), Shape(9, 512, 4)]),
    "two padded": (["padded"] * 2, [Shape(24, 512, 4), Shape(8, 512, 2)]),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_two_graphs_of_one_buffer_take_turns(pool: Any, num_ranks: int, pair: str) -> None:
    found = pool.run(replay_two, *PAIRS[pair], NUM_REPLAYS, num_ranks=num_ranks, timeout_s=200)
    assert found == [[]] * num_ranks


def go_on_after_growth(group: Any, shape: Shape) -> list[str]:
    """A graph keeps the memory it was recorded with, while the buffer moves on to more."""
    rank, kind, faults = group.rank(), KINDS["low latency"], []
    buffer = open_buffer(group, shape)
    graph = Graph(buffer, shape, kind)
    larger = shape._replace(num_tokens=4 * shape.num_tokens)
    for index in range(1, 21):
        brought = bring(index, shape, group.size())
        made = graph.replay(brought.on_gpu(rank))
        faults += kind.judge(made, shape, brought, rank)
        brought = bring(index, larger, group.size())
        made = kind.calls(buffer, larger, brought.on_gpu(rank))
        faults += kind.judge(made, larger, brought, rank)
    return faults[:20]


def test_a_graph_outlives_the_growth_of_its_buffer(pool: Any) -> None:
    assert pool.run(go_on_after_growth, Shape(16, 512, 4), num_ranks=2) == [[]] * 2


def record_the_layout_too(group: Any, shape: Shape) -> list[str]:
    """Counting where tokens go waits for no device, so it can be part of a graph."""
    rank, kind, faults = group.rank(), KINDS["padded"], []
    buffer = open_buffer(group, shape)
    given = bring(0, shape, group.size()).on_gpu(rank)

    def calls() -> Any:
        layout = buffer.get_dispatch_layout(given[1], NUM_LOCAL * group.size())
        return padded(buffer, shape, [*given, layout[3], layout[2]])

    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        made = calls()
    for index in range(1, 21):
        brought = bring(index, shape, group.size())
        for mine, new in zip(given, brought.on_gpu(rank), strict=True):
            mine.copy_(new)
        graph.replay()
        faults += kind.judge(made, shape, brought, rank)
    return faults[:20]


def test_the_layout_can_be_recorded_too(pool: Any) -> None:
    assert pool.run(record_the_layout_too, Shape(32, 512, 4), num_ranks=2) == [[]] * 2


def ask_for_too_much(group: Any, shape: Shape) -> str:
    """A graph that would need more memory than there is cannot be recorded; the error says so."""
    buffer = open_buffer(group, shape)
    larger = shape._replace(num_tokens=4 * shape.num_tokens)
    given = bring(0, larger, group.size()).on_gpu(group.rank())
    low_latency(buffer, shape, bring(0, shape, group.size()).on_gpu(group.rank()))
    torch.cuda.synchronize()
    try:
        with recording(torch.cuda.CUDAGraph()):
            low_latency(buffer, larger, given)
    except Exception as error:
        return type(error).__name__
    return ""


def test_what_cannot_be_recorded_says_so(pool: Any) -> None:
    assert pool.run(ask_for_too_much, Shape(16, 512, 4), num_ranks=2) == ["BufferTooSmallError"] * 2
