"""What all low-latency tests share: worlds, rows, calls, and what the oracle says of them.

The ranks are processes with memory between them, processes with sockets, and threads. A job is all
that the ranks of a test do in one world; what they return is compared in `low_latency_checks`.
Memory is poisoned first, as in `test_high_throughput`, and so are all rows and weights that combine
must not read. What is tried, and in how many ways, is the tests' matter.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from crossdock import Buffer
from crossdock import reference_low_latency as oracle
from crossdock.cases import ROUTING_CASES, Routing, origin_rows
from crossdock.errors import UnsupportedError
from crossdock.transports.loopback import LoopbackComm, run_threads
from tests.worlds.low_latency_checks import (
    Form,
    Slabs,
    exact_sums,
    identity_faults,
    slab_faults,
    sum_faults,
)
from tests.worlds.test_high_throughput import make_weights, poisoned_allocations

TRANSPORTS = ["one_sided", "collective", "loopback"]
WIDTHS = {"bf16": 37, "fp8": 256, "fp8_round_scale": 128, "fp8_ue8m0": 512, "int8": 33}
ARGUMENTS = {
    "bf16": {"use_fp8": False},
    "fp8": {},
    "fp8_round_scale": {"round_scale": True},
    "fp8_ue8m0": {"round_scale": True, "use_ue8m0": True},
    "int8": {},
}
"""What makes `low_latency_dispatch` use a format, in a buffer that is made for it."""
CULPRIT = 1
"""The rank that does something wrong, where it is one alone."""


# Worlds: a job is given the world it is in, which is a process group or a thread's communicator.


def run_world(pool, transport, job, *args, num_ranks=4, timeout_s=60):
    """Run `job(world, transport, *args)` on every rank, in poisoned memory."""
    if transport != "loopback":
        job = (in_poisoned_memory, job, transport, *args)
        return pool.run(*job, num_ranks=num_ranks, timeout_s=timeout_s)
    with poisoned_allocations():
        return run_threads(num_ranks, lambda comm: job(comm, transport, *args))


def in_poisoned_memory(group, job, *args):
    with poisoned_allocations():
        return job(group, *args)


def open_buffer(world, transport, *, num_slots=64, hidden=512, **options) -> Buffer:
    """A buffer with room for calls of that size, so that poison reaches what they use."""
    here = {"comm": world} if isinstance(world, LoopbackComm) else {"group": world}
    num_ranks = world.Get_size() if isinstance(world, LoopbackComm) else world.size()
    room = Buffer.get_low_latency_rdma_size_hint(num_slots, 2 * hidden, num_ranks, num_ranks)
    limits = {"timeout_s": 30, "first_call_timeout_s": 30, **options}
    return Buffer(**here, transport=transport, low_latency_mode=True, num_rdma_bytes=room, **limits)


def poison(buffer: Buffer) -> None:
    """Overwrites the memory rows land in. Nobody may be in a call, or have one in flight."""
    buffer.warmup(0, 1)
    with contextlib.suppress(UnsupportedError):
        buffer.get_local_buffer_tensor(torch.uint8).fill_(0xFF)
    buffer.warmup(0, 1)


def format_of(form: Form) -> dict:
    """The arguments of the buffer that say how rows are encoded and laid out."""
    name = "int8" if form.name == "int8" else "fp8"
    return {"low_latency_format": name, "low_latency_rows": form.rows}


# Rows: what tokens are, and what experts answer.


def make_tokens(rank: int, num_tokens: int, form: Form) -> torch.Tensor:
    """Tokens of all sizes, some of them zeros, some too small for a scale of their own."""
    if form.name == "bf16":
        return origin_rows(rank, num_tokens, form.hidden, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn((num_tokens, form.hidden), generator=generator)
    rows *= 2.0 ** torch.randint(-6, 7, (num_tokens, 1), generator=generator)
    rows[3::7] = 0
    rows[5::7] *= 1e-7
    return rows.bfloat16()


def all_tokens(routing: Routing, form: Form) -> list[torch.Tensor]:
    return [make_tokens(rank, len(idx), form) for rank, idx in enumerate(routing.topk_idxs)]


def give_weights(topk_idx: torch.Tensor, seed: int) -> torch.Tensor:
    """Weights of choices, and NaN where nothing is chosen."""
    return make_weights(topk_idx, seed).masked_fill(topk_idx < 0, torch.nan)


def all_weights(routing: Routing) -> list[torch.Tensor]:
    return [give_weights(idx, rank) for rank, idx in enumerate(routing.topk_idxs)]


def make_noise(rank: int, counts: list[int], hidden: int) -> list[torch.Tensor]:
    """What the experts of a rank answer: noise, so that no sum is right by chance."""
    generator = torch.Generator().manual_seed(1000 + rank)
    rows = torch.randn((sum(counts), hidden), generator=generator).bfloat16()
    return list(rows.split(counts))


def decoded(got: Slabs, form: Form, routing: Routing) -> list[torch.Tensor]:
    """The tokens of every expert here, in bf16."""
    parts = [
        part.flatten(0, len(form.shape(routing)) - 1)
        for part in (got.x if isinstance(got.x, tuple) else (got.x,))
    ]
    places = form.places(got.recv_count.tolist(), routing)
    return [decode([part[place] for part in parts], form) for place in places]


def decode(parts: list[torch.Tensor], form: Form) -> torch.Tensor:
    encoded = tuple(parts) if len(parts) > 1 else parts[0]
    return oracle.decode(encoded, form.name).bfloat16()


def lay_out(rows: list[torch.Tensor], form: Form, routing: Routing) -> torch.Tensor:
    """The rows of every expert where combine looks for them; all others are NaN."""
    shape = form.shape(routing)
    flat = torch.full((math.prod(shape), form.hidden), torch.nan, dtype=torch.bfloat16)
    places = form.places([len(each) for each in rows], routing)
    for each, place in zip(rows, places, strict=True):
        flat[place] = each
    return flat.view(*shape, form.hidden)


def turned(form: Form) -> Form:
    """The same with rows in the other layout."""
    return replace(form, rows="compact" if form.rows == "slab" else "slab")


# Calls.


def start_dispatch(buffer, routing, form, *, x=None, **rest):
    """The sending half: what there will be, and the hook, which is None where it has run."""
    topk_idx = routing.topk_idxs[buffer.rank]
    x, recv_count, handle, _, hook = buffer.low_latency_dispatch(
        make_tokens(buffer.rank, len(topk_idx), form) if x is None else x,
        topk_idx,
        form.num_slots,
        routing.num_experts,
        **ARGUMENTS[form.name],
        **rest,
    )
    return Slabs(x, recv_count, handle), hook


def dispatch(buffer, routing, form, *, use_hook=False, **rest) -> Slabs:
    got, hook = start_dispatch(buffer, routing, form, return_recv_hook=use_hook, **rest)
    run_hook(hook, use_hook=use_hook)
    return got


def run_hook(hook, *, use_hook):
    assert (hook is not None) == use_hook
    if use_hook:
        hook()


def start_combine(buffer, x, routing, handle, **rest):
    topk_idx = routing.topk_idxs[buffer.rank]
    weights = give_weights(topk_idx, buffer.rank)
    combined, _, hook = buffer.low_latency_combine(x, topk_idx, weights, handle, **rest)
    return combined, hook


def combine(buffer, x, routing, handle, *, use_hook=False, **rest) -> torch.Tensor:
    combined, hook = start_combine(buffer, x, routing, handle, return_recv_hook=use_hook, **rest)
    run_hook(hook, use_hook=use_hook)
    return combined


def noise_for(buffer, got: Slabs, form: Form, routing: Routing) -> torch.Tensor:
    """What the experts here answer, laid out as `form` says."""
    noise = make_noise(buffer.rank, got.recv_count.tolist(), form.hidden)
    return lay_out(noise, form, routing)


class Trip(NamedTuple):
    """What one rank got in one world: rows, and sums of unchanged rows and of noise."""

    slabs: Slabs
    unchanged: torch.Tensor
    noise: torch.Tensor


def go_once(buffer, routing, form, *, use_hook=False) -> Trip:
    poison(buffer)
    got = dispatch(buffer, routing, form, use_hook=use_hook)
    same = lay_out(decoded(got, form, routing), form, routing)
    out = torch.full((len(routing.topk_idxs[buffer.rank]), form.hidden), torch.nan).bfloat16()
    unchanged = combine(buffer, same, routing, got.handle, use_hook=use_hook, out=out)
    assert unchanged is out
    noise = noise_for(buffer, got, turned(form), routing)
    return Trip(got, out, combine(buffer, noise, routing, got.handle, use_hook=use_hook))


def go_everywhere(world, transport, routing, plans) -> list[Trip]:
    """One trip for each plan; a buffer for each kind of row."""
    with contextlib.ExitStack() as stack:
        buffers = {}
        for form, _ in plans:
            options = tuple(format_of(form).items())
            if options not in buffers:
                buffer = open_buffer(world, transport, **dict(options))
                buffers[options] = stack.enter_context(buffer)
        return [
            go_once(buffers[tuple(format_of(form).items())], routing, form, use_hook=use_hook)
            for form, use_hook in plans
        ]


# What the oracle says.


@functools.cache
def draw(case: str, num_ranks: int) -> Routing:
    return ROUTING_CASES[case].make(num_ranks, seed=num_ranks)


def form_for(routing: Routing, name: str, rows: str = "slab") -> Form:
    """With slots for the largest rank, and some more where there are several ranks."""
    most = max(len(idx) for idx in routing.topk_idxs)
    return Form(name, rows, max(most, 1) + len(routing.topk_idxs) - 1, WIDTHS[name])


class Right(NamedTuple):
    """What every rank must receive, and get back."""

    slabs: list
    unchanged: list
    noise: list


def judge(routing: Routing, form: Form) -> Right:
    xs, weights = all_tokens(routing, form), all_weights(routing)
    slabs = oracle.dispatch(
        xs, routing.topk_idxs, num_experts=routing.num_experts, format=form.name
    )
    same = [decoded_slabs(each, form) for each in slabs]
    noise = [make_noise(rank, each.recv_count, form.hidden) for rank, each in enumerate(slabs)]
    return Right(slabs, exact_sums(same, routing, weights), exact_sums(noise, routing, weights))


def decoded_slabs(right: oracle.ReferenceSlabs, form: Form) -> list[torch.Tensor]:
    planes = (right.rows,) if right.scales is None else (right.rows, right.scales)
    return [decode(list(parts), form) for parts in zip(*planes, strict=True)]


@functools.cache
def judge_case(case: str, num_ranks: int, name: str) -> Right:
    routing = draw(case, num_ranks)
    return judge(routing, form_for(routing, name))


def trip_faults(trips: list[Trip], right: Right, routing: Routing, form: Form) -> list[str]:
    slabs, unchanged, noise = zip(*trips, strict=True)
    return [
        *slab_faults(slabs, right.slabs, form, routing),
        *sum_faults(unchanged, right.unchanged),
        *identity_faults(
            unchanged, all_tokens(routing, form), routing, all_weights(routing), form=form.name
        ),
        *sum_faults(noise, right.noise),
    ]
