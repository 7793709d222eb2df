"""A thousand rounds of both modes on one buffer, received in whatever order the ranks like.

All ranks follow one schedule, drawn from one seed: which call comes next, and with what. When it
runs a hook each rank decides for itself, and sometimes leaves it to another thread; between the
halves of a call others pass, of either mode. A rank judges all that it received against a quick
expectation, and a sample of it against the oracle. Nobody ever cleans anything.

T tokens of a rank, K top-k, H hidden.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from crossdock import codec, formats, ops, reference
from crossdock import reference_low_latency as oracle
from crossdock.cases import Routing
from tests.worlds import test_soak as high_throughput
from tests.worlds.low_latency_checks import Exact, Form, Slabs, exact_sums, slab_faults, sum_faults
from tests.worlds.low_latency_worlds import (
    decoded_slabs,
    give_weights,
    lay_out,
    make_tokens,
    open_buffer,
    run_world,
    start_dispatch,
)
from tests.worlds.test_soak import NUM_EXPERTS, NUM_RANKS, NUM_TOPK, nap

NUM_LOCAL, HIDDEN, MOST_TOKENS = NUM_EXPERTS // NUM_RANKS, 128, 12
NUM_STORED = 500
"""Tokens that a rank has in store; each round takes others, so that old ones are not mistaken."""
TOKEN_FORMATS = {
    "bf16": formats.BF16,
    "fp8": formats.FP8_BLOCK128,
    "fp8_round_scale": formats.FP8_ROUND_SCALE,
    "int8": formats.INT8_ROW,
}


class Store:
    """All tokens there are, as the oracle encodes and decodes them, and what experts make of them.

    Attributes:
        tokens: of every rank.
        planes: of every format, plane and rank.
        decoded: of every format and rank.
        factors: what an expert multiplies its tokens by, column by column.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        form = Form("fp8", "slab", 0, HIDDEN)
        self.tokens = [make_tokens(rank, NUM_STORED, form) for rank in range(NUM_RANKS)]
        self.planes, self.decoded = {}, {}
        for name in names:
            encoded = [oracle.encode(each, name) for each in self.tokens]
            self.decoded[name] = [oracle.decode(each, name).bfloat16() for each in encoded]
            of_ranks = [each if isinstance(each, tuple) else (each,) for each in encoded]
            self.planes[name] = list(zip(*of_ranks, strict=True))
        generator = torch.Generator().manual_seed(1)
        self.factors = torch.randn((NUM_EXPERTS, HIDDEN), generator=generator).bfloat16()


class Batch(NamedTuple):
    """The tokens of one round: where they lie in the store, and where they go."""

    index: int
    form: Form
    routing: Routing
    begins: list[int]

    def of(self, rank: int, stored: list) -> torch.Tensor:
        """What is stored of the tokens of one rank."""
        begin = self.begins[rank]
        return stored[rank][begin : begin + len(self.routing.topk_idxs[rank])]

    def of_all(self, stored: list) -> torch.Tensor:
        """The same of all ranks together."""
        return torch.cat([self.of(rank, stored) for rank in range(NUM_RANKS)])

    def weights(self, rank: int) -> torch.Tensor:
        return give_weights(self.routing.topk_idxs[rank], NUM_RANKS * self.index + rank)


def draw_batch(index: int, plan: random.Random, rows: str, names: tuple[str, ...]) -> Batch:
    generator = torch.Generator().manual_seed(index)
    idxs = []
    for _ in range(NUM_RANKS):
        num_tokens = int(torch.randint(0, MOST_TOKENS + 1, (), generator=generator))
        idx = torch.randint(0, NUM_EXPERTS, (num_tokens, NUM_TOPK), generator=generator)
        empty = torch.rand(idx.shape, generator=generator) < 0.2
        idxs.append(idx.masked_fill_(empty, -1))
    form = Form(plan.choice(names), rows, plan.choice((12, 12, 13, 40)), HIDDEN)
    begins = [plan.randrange(NUM_STORED - MOST_TOKENS) for _ in range(NUM_RANKS)]
    return Batch(index, form, Routing(idxs, NUM_EXPERTS), begins)


# What a rank must see.


def expect_slabs(batch: Batch, store: Store, rank: int) -> oracle.ReferenceSlabs:
    """What a rank must receive, expert by expert, all its rows at once."""
    idxs = batch.routing.topk_idxs
    idx = torch.cat(idxs)
    sources = torch.cat([torch.full((len(each),), rank) for rank, each in enumerate(idxs)])
    tokens = torch.cat([torch.arange(len(each)) for each in idxs])
    chosen = [(idx == NUM_LOCAL * rank + expert).any(1) for expert in range(NUM_LOCAL)]
    planes = [batch.of_all(stored) for stored in store.planes[batch.form.name]]
    counts = [torch.bincount(sources[each], minlength=NUM_RANKS) for each in chosen]
    return oracle.ReferenceSlabs(
        rows=[planes[0][each] for each in chosen],
        scales=[planes[1][each] for each in chosen] if len(planes) > 1 else None,
        recv_count=[int(each.sum()) for each in chosen],
        src_info=[tokens[each].tolist() for each in chosen],
        layout_range=[
            list(zip((each.cumsum(0) - each).tolist(), each.tolist(), strict=True))
            for each in counts
        ],
    )


def expect_sums(batch: Batch, store: Store, rank: int) -> list[Exact]:
    """What a rank must get back from every rank, all its tokens at once."""
    idx = batch.routing.topk_idxs[rank]
    rows = batch.of(rank, store.decoded[batch.form.name])[:, None]
    terms = (rows * store.factors[idx]).double() * batch.weights(rank).double()[:, :, None]
    parts = []
    for peer in range(NUM_RANKS):
        here = (idx >= 0) & (idx // NUM_LOCAL == peer)
        mine = torch.where(here[:, :, None], terms, 0)
        sums = reference.ReferenceCombine(mine.sum(1), None, mine.abs().sum(1))
        parts.append(Exact(sums, here.sum(1)))
    return parts


def ask_oracle(batch: Batch, store: Store, rank: int) -> tuple[oracle.ReferenceSlabs, list[Exact]]:
    """The same as the two above, the slow and obvious way."""
    xs = [batch.of(peer, store.tokens) for peer in range(NUM_RANKS)]
    name, idxs = batch.form.name, batch.routing.topk_idxs
    slabs = oracle.dispatch(xs, idxs, num_experts=NUM_EXPERTS, format=name)
    received = [decoded_slabs(each, batch.form) for each in slabs]
    answers = [answer(each, store, peer) for peer, each in enumerate(received)]
    weights = [batch.weights(peer) for peer in range(NUM_RANKS)]
    return slabs[rank], exact_sums(answers, batch.routing, weights)[rank]


def answer(rows: list[torch.Tensor], store: Store, rank: int) -> list[torch.Tensor]:
    """What the experts of a rank make of their tokens."""
    factors = store.factors[NUM_LOCAL * rank : NUM_LOCAL * (rank + 1)]
    return [each * factor for each, factor in zip(rows, factors, strict=True)]


# What a rank does.


@dataclass
class Flight:
    """A call whose receiving half has not been looked at yet."""

    hook: Callable[[], None]
    judge: Callable[[], None]
    receiving: Future | None = None


class Soak(NamedTuple):
    """What one rank saw."""

    faults: list[str]
    num_judged: int
    num_overtaken: int


class Rank:
    """One rank on its way through the schedule."""

    def __init__(self, buffer, store, *, judge_every, helper) -> None:
        self.buffer, self.store, self.helper = buffer, store, helper
        self.narrow = [each[:, : high_throughput.HIDDEN].contiguous() for each in store.tokens]
        self.plan, self.whims = random.Random(0), random.Random(100 + buffer.rank)
        self.flights = {"dispatch": [], "combine": []}
        self.outward: list[tuple[Batch, Slabs, Flight]] = []
        self.judge_every, self.seen = judge_every, Soak([], 0, 0)

    def go(self, num_rounds: int, rows: str, names: tuple[str, ...]) -> Soak:
        for index in range(num_rounds):
            batch = draw_batch(index, self.plan, rows, names)
            if self.plan.random() < 0.4:
                self.go_there_and_back(batch)
            else:
                self.send_out(batch)
            while len(self.outward) > self.plan.randrange(4):
                self.send_back(self.plan.randrange(len(self.outward)))
            self.follow_whims()
        while self.outward:
            self.send_back(0)
        for kind in self.flights:
            self.make_room(kind, most=0)
        return self.seen

    def go_there_and_back(self, batch: Batch) -> None:
        """A round in the other mode."""
        xs = [batch.of(rank, self.narrow) for rank in range(NUM_RANKS)]
        rank = self.buffer.rank
        got, back = high_throughput.go_once(self.buffer, xs[rank], batch.routing, self.nap)
        judge = high_throughput.judge
        if self.is_sampled(batch):
            judge = high_throughput.judge_fully
        self.note(batch, judge(got, back, xs, batch.routing, rank))

    def send_out(self, batch: Batch) -> None:
        rank = self.buffer.rank
        rest = {"return_recv_hook": self.plan.random() < 0.7}
        if self.plan.random() < 0.3:
            rest["topk_weights"] = batch.weights(rank)
        self.make_room("dispatch", most=1)
        self.nap()
        x = batch.of(rank, self.store.tokens)
        got, hook = start_dispatch(self.buffer, batch.routing, batch.form, x=x, **rest)
        flight = Flight(hook or no_hook, lambda: self.judge_slabs(batch, got))
        self.outward.append((batch, got, flight))
        self.take_off("dispatch", flight, has_hook=hook is not None)

    def send_back(self, which: int) -> None:
        batch, got, flight = self.outward.pop(which)
        self.receive("dispatch", flight)
        self.make_room("combine", most=1)
        rank, slab = self.buffer.rank, replace(batch.form, rows="slab")
        rows = answer(unpack(batch, got), self.store, rank)
        answers = lay_out(rows, self.plan.choice((slab, batch.form)), batch.routing)
        rest = {"use_logfmt": self.plan.random() < 0.1, "zero_copy": self.plan.random() < 0.1}
        if rest["zero_copy"]:
            written = self.buffer.get_next_low_latency_combine_buffer(got.handle)
            written.copy_(lay_out(rows, slab, batch.routing))
        self.nap()
        combined, _, hook = self.buffer.low_latency_combine(
            answers,
            batch.routing.topk_idxs[rank],
            batch.weights(rank),
            got.handle,
            return_recv_hook=self.plan.random() < 0.7,
            **rest,
        )
        judge = self.judge_sums
        flight = Flight(hook or no_hook, lambda: judge(batch, combined, rest["use_logfmt"]))
        self.take_off("combine", flight, has_hook=hook is not None)

    def take_off(self, kind: str, flight: Flight, *, has_hook: bool) -> None:
        self.flights[kind].append(flight)
        if not has_hook:
            self.receive(kind, flight)

    def make_room(self, kind: str, *, most: int) -> None:
        while len(self.flights[kind]) > most:
            self.receive(kind, self.whims.choice(self.flights[kind]))

    def follow_whims(self) -> None:
        """Receive something, or have it received beside the next calls, or do nothing."""
        for kind, flights in self.flights.items():
            if flights and self.whims.random() < 0.3:
                self.receive(kind, self.whims.choice(flights))
            elif flights and self.whims.random() < 0.2:
                flight = self.whims.choice(flights)
                flight.receiving = flight.receiving or self.helper.submit(flight.hook)

    def receive(self, kind: str, flight: Flight) -> None:
        """Run a hook, unless that was done, and judge what it brought."""
        if flight not in self.flights[kind]:
            return
        if flight.receiving is not None:
            flight.receiving.result()
        flight.hook()
        flight.judge()
        overtaken = self.seen.num_overtaken + (flight is not self.flights[kind][0])
        self.seen = self.seen._replace(num_overtaken=overtaken)
        self.flights[kind].remove(flight)

    def judge_slabs(self, batch: Batch, got: Slabs) -> None:
        rank = self.buffer.rank
        rights = [expect_slabs(batch, self.store, rank)]
        if self.is_sampled(batch):
            rights.append(ask_oracle(batch, self.store, rank)[0])
        for right in rights:
            self.note(batch, slab_faults([got], [right], batch.form, batch.routing))

    def judge_sums(self, batch: Batch, combined: torch.Tensor, use_logfmt: bool) -> None:
        rank = self.buffer.rank
        rights = [expect_sums(batch, self.store, rank)]
        if self.is_sampled(batch):
            rights.append(ask_oracle(batch, self.store, rank)[1])
        for right in rights:
            self.note(batch, sum_faults([combined], [right], use_logfmt=use_logfmt))

    def is_sampled(self, batch: Batch) -> bool:
        return batch.index % self.judge_every == 0

    def note(self, batch: Batch, faults: list[str]) -> None:
        found = [*self.seen.faults, *(f"round {batch.index}: {fault}" for fault in faults)][:20]
        self.seen = self.seen._replace(faults=found, num_judged=self.seen.num_judged + 1)

    def nap(self) -> None:
        nap(self.whims, self.buffer.rank)


def no_hook() -> None:
    """What is run where a call had no hook."""


def unpack(batch: Batch, got: Slabs) -> list[torch.Tensor]:
    """The tokens of every expert here, decoded by the library."""
    planes = got.x if isinstance(got.x, tuple) else (got.x,)
    flat = [plane.flatten(0, got.handle[0].dim() - 1) for plane in planes]
    flat = [plane if plane.dim() == 2 else plane[:, None] for plane in flat]
    places = batch.form.places(got.recv_count.tolist(), batch.routing)
    form = TOKEN_FORMATS[batch.form.name]
    return [codec.decode([plane[here] for plane in flat], form).bfloat16() for here in places]


def soak(world, transport, num_rounds, judge_every, rows, names) -> Soak:
    options = {"low_latency_format": names[-1], "low_latency_rows": rows}
    with (
        open_buffer(world, transport, num_slots=1, hidden=1, **options) as buffer,
        ThreadPoolExecutor(1) as helper,
    ):
        rank = Rank(buffer, Store(names), judge_every=judge_every, helper=helper)
        return rank.go(num_rounds, rows, names)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("transport", "num_rounds", "judge_every", "rows", "names"),
    [
        ("one_sided", 1000, 100, "slab", ("bf16", "fp8_round_scale", "fp8")),
        ("collective", 150, 30, "compact", ("bf16", "int8")),
        ("loopback", 150, 30, "slab", ("bf16", "int8")),
    ],
)
def test_a_long_mixed_run_stays_right(pool, transport, num_rounds, judge_every, rows, names):
    job = (soak, num_rounds, judge_every, rows, names)
    for seen in run_world(pool, transport, *job, num_ranks=NUM_RANKS, timeout_s=180):
        assert seen.faults == []
        assert seen.num_judged > 1.5 * num_rounds
        assert seen.num_overtaken > 0.05 * num_rounds


def place_too_little(landing, rows, slots, *, out):
    PLACE_ROWS(landing, rows[1:], slots[1:], out=out)


PLACE_ROWS, CULPRIT = ops.place_rows, 1


def soak_with_a_culprit(world, transport, *args) -> Soak:
    wrong = place_too_little if world.rank() == CULPRIT else PLACE_ROWS
    with mock.patch.object(ops, "place_rows", wrong):
        return soak(world, transport, *args)


def test_a_rank_that_loses_rows_is_noticed(pool):
    job = (soak_with_a_culprit, 10, 5, "slab", ("bf16", "fp8"))
    faults = [seen.faults for seen in run_world(pool, "one_sided", *job, num_ranks=NUM_RANKS)]
    assert any("rows wrong" in fault for fault in faults[CULPRIT])
    for rank, found in enumerate(faults):
        assert found, "all miss what the culprit lost"
        assert rank == CULPRIT or all("combined" in fault for fault in found)
