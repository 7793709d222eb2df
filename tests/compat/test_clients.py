"""Code written for DeepEP, run unchanged on CPU tensors in real processes, and judged.

The clients (`intranode_program`, `training_client`, `inference_client`) import `deep_ep` only. What
they get is compared here with the oracle: moved data bit for bit, sums by `calc_diff` below 5e-6,
weights below 1e-9. Sums of products that a client rounds once more before it sends them have an
error of two roundings, which the same bound covers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import deep_ep
from crossdock import reference
from crossdock.cases import ROUTING_CASES
from crossdock.worlds import Pool
from deep_ep.utils.math import per_token_cast_back, per_token_cast_to_fp8
from tests.compat import inference_client, intranode_program, training_client

COMBINE_BOUND = 5e-6
WEIGHTS_BOUND = 1e-9
HIDDEN = 256
MODES = {"synchronous": False, "through events": True}

TRAINING_CASES = ["uniform", "uneven", "one_rank_empty", "slots_empty", "duplicates"]


class World(NamedTuple):
    """What every rank dispatches, and what each expert multiplies by."""

    xs: list[torch.Tensor]
    topk_idxs: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    factors: torch.Tensor


def make_world(case: str, num_ranks: int, dtype: torch.dtype = torch.bfloat16) -> World:
    routing = ROUTING_CASES[case].make(num_ranks, seed=1)
    generator = torch.Generator().manual_seed(2)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32)

    idxs = routing.topk_idxs
    return World(
        xs=[draw(len(idx), HIDDEN).to(dtype) for idx in idxs],
        topk_idxs=idxs,
        topk_weights=[draw(*idx.shape).abs() * (idx >= 0) for idx in idxs],
        factors=1 + draw(routing.num_experts).abs(),
    )


def dense_layer(world: World, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """`sum_k weight[t, k] * factor[expert] * x[t]` in float64, without any rank."""
    outputs = []
    for x, idx, weights in zip(xs, world.topk_idxs, world.topk_weights, strict=True):
        products = world.factors.double()[idx.clamp(min=0)] * weights.double() * (idx >= 0)
        outputs.append(x.double() * products.sum(dim=1, keepdim=True))
    return outputs


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_deep_eps_own_test_shape(pool: Pool, num_ranks: int) -> None:
    assert pool.run(intranode_program.run, 48, HIDDEN, num_ranks=num_ranks) == [24] * num_ranks


def test_deep_eps_own_test_shape_with_an_odd_width(pool: Pool) -> None:
    assert pool.run(intranode_program.run, 17, 384 + 5) == [24] * 4


class Seen(NamedTuple):
    """What a rank gets from the plain sequence of calls."""

    recv_x: Any
    recv_idx: torch.Tensor
    recv_weights: torch.Tensor
    counts: list[int]
    handle: tuple[torch.Tensor, ...]
    cached_x: Any
    combined: torch.Tensor
    combined_weights: torch.Tensor


def plain_sequence(
    group: dist.ProcessGroup, world: World, use_fp8: bool, use_async: bool, expert_alignment: int
) -> Seen:
    """Layout, dispatch, cached dispatch, combine: what every client does in some order."""
    rank = group.rank()
    x = per_token_cast_to_fp8(world.xs[rank]) if use_fp8 else world.xs[rank]
    buffer = deep_ep.Buffer(group, 1 << 20)
    events: dict[str, Any] = {"async_finish": use_async, "allocate_on_comm_stream": use_async}
    if use_async:
        events["previous_event"] = buffer.capture()
    per_rank, per_domain, per_expert, is_token_in_rank, event = buffer.get_dispatch_layout(
        world.topk_idxs[rank], len(world.factors), **events
    )
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x,
        None,
        per_rank,
        per_domain,
        is_token_in_rank,
        per_expert,
        world.topk_idxs[rank],
        world.topk_weights[rank],
        expert_alignment,
        **{**events, "previous_event": event if use_async else None},
    )
    if use_async:
        event.current_stream_wait()
    handle = tuple(tensor.clone() for tensor in handle)
    cached_x, *_ = buffer.dispatch(x, handle=handle)
    rows = per_token_cast_back(*recv_x) if use_fp8 else recv_x
    combined, combined_weights, event = buffer.combine(
        rows, handle, topk_weights=recv_weights, **events
    )
    if use_async:
        event.current_stream_wait()
    return Seen(
        owned(recv_x),
        recv_idx,
        recv_weights,
        counts,
        handle,
        owned(cached_x),
        combined,
        combined_weights,
    )


def owned(x: Any) -> Any:
    """Rows in memory of their own, to be sent to the judge: rows and scales may share some."""
    return tuple(part.clone() for part in x) if isinstance(x, tuple) else x.clone()


@pytest.mark.parametrize("use_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("use_async", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("case", ROUTING_CASES)
def test_plain_sequence_equals_the_oracle(
    pool: Pool, case: str, use_async: bool, use_fp8: bool
) -> None:
    world = make_world(case, 4)
    seen = pool.run(plain_sequence, world, use_fp8, use_async, 8)
    xs = [per_token_cast_to_fp8(x) if use_fp8 else x for x in world.xs]
    expected = reference.dispatch(
        xs,
        world.topk_idxs,
        world.topk_weights,
        num_experts=len(world.factors),
        expert_alignment=8,
    )
    for got, wanted in zip(seen, expected, strict=True):
        check_dispatched(got, wanted)
    check_combined(world, seen)


def check_dispatched(got: Seen, wanted: reference.ReferenceDispatch) -> None:
    for moved in (got.recv_x, got.cached_x):
        check_equal_rows(moved, wanted.recv_x)
    assert torch.equal(got.recv_idx, wanted.recv_topk_idx)
    assert torch.equal(got.recv_weights, wanted.recv_topk_weights)
    assert got.counts == wanted.num_recv_tokens_per_expert
    assert torch.equal(got.handle[0], wanted.rank_prefix_matrix)
    assert torch.equal(got.handle[3], wanted.recv_src_idx)


def check_equal_rows(got: Any, wanted: Any) -> None:
    if not isinstance(wanted, tuple):
        got, wanted = (got,), (wanted,)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert torch.equal(mine.contiguous().view(torch.uint8), theirs.view(torch.uint8))


def check_combined(world: World, seen: list[Seen]) -> None:
    rows = [
        per_token_cast_back(*each.recv_x) if isinstance(each.recv_x, tuple) else each.recv_x
        for each in seen
    ]
    weights = [each.recv_weights for each in seen]
    expected = reference.combine(rows, world.topk_idxs, len(world.factors), topk_weights=weights)
    for got, wanted in zip(seen, expected, strict=True):
        assert got.combined.dtype == torch.bfloat16
        assert reference.calc_diff(got.combined, wanted.combined) < COMBINE_BOUND
        assert reference.calc_diff(got.combined_weights, wanted.topk_weights) < WEIGHTS_BOUND


def train(
    group: dist.ProcessGroup, world: World, use_async: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, gradient of the rows and gradient of the weights of one rank."""
    x = world.xs[group.rank()].clone().requires_grad_()
    probs = world.topk_weights[group.rank()].clone().requires_grad_()
    y = training_client.moe_layer(
        x,
        world.topk_idxs[group.rank()],
        probs,
        scales=world.factors,
        group=group,
        use_async=use_async,
    )
    y.backward(torch.cos(world.xs[group.rank()]))
    return y.detach(), x.grad, probs.grad


@pytest.mark.parametrize("use_async", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("case", TRAINING_CASES)
def test_training_in_single_precision(pool: Pool, case: str, use_async: bool) -> None:
    """Single precision leaves no rounding to speak of: everything is held to the weights' bound."""
    world = make_world(case, 4, torch.float32)
    check_training(world, pool.run(train, world, use_async), bound=WEIGHTS_BOUND)


@pytest.mark.parametrize("case", TRAINING_CASES)
def test_training_in_bf16(pool: Pool, case: str) -> None:
    world = make_world(case, 4)
    check_training(world, pool.run(train, world, True), bound=COMBINE_BOUND)


def check_training(world: World, seen: list[tuple[torch.Tensor, ...]], bound: float) -> None:
    xs = [x.double().requires_grad_() for x in world.xs]
    weights = [each.double().requires_grad_() for each in world.topk_weights]
    wanted = dense_layer(world._replace(topk_weights=weights), xs)
    for rank, (y, grad_x, grad_weights) in enumerate(seen):
        wanted[rank].backward(torch.cos(world.xs[rank]).double())
        assert reference.calc_diff(y, wanted[rank].detach()) < bound
        assert reference.calc_diff(grad_x, xs[rank].grad) < bound
        assert reference.calc_diff(grad_weights, weights[rank].grad) < bound


def reuse(group: dist.ProcessGroup) -> tuple[bool, bool]:
    """Whether the kept buffer serves a second layer of this width, and a wider one."""
    first = training_client.get_buffer(group, 512)
    return training_client.get_buffer(group, 512) is first, (
        training_client.get_buffer(group, 4096) is first
    )


def test_a_kept_buffer_is_replaced_when_the_hints_grow(pool: Pool) -> None:
    assert pool.run(reuse) == [(True, False)] * 4


def infer(
    group: dist.ProcessGroup, world: World, use_fp8: bool
) -> tuple[inference_client.Prepared, torch.Tensor]:
    rank = group.rank()
    prepared, output = inference_client.layer(
        group,
        world.xs[rank],
        world.topk_idxs[rank],
        world.topk_weights[rank],
        factors=world.factors,
        use_fp8=use_fp8,
    )
    return prepared._replace(x=owned(prepared.x)), output


@pytest.mark.parametrize("use_fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("case", ["uniform", "one_rank_empty", "nobody", "tokens_empty"])
def test_inference(pool: Pool, case: str, use_fp8: bool) -> None:
    world = make_world(case, 4)
    seen = pool.run(infer, world, use_fp8)
    sent: list[Any] = [per_token_cast_to_fp8(x) if use_fp8 else x for x in world.xs]
    moved = reference.dispatch(
        sent, world.topk_idxs, world.topk_weights, num_experts=len(world.factors)
    )
    xs = [per_token_cast_back(*x) if use_fp8 else x for x in sent]
    for (prepared, output), received, dense in zip(
        seen, moved, dense_layer(world, xs), strict=True
    ):
        rows = prepared.x if prepared.scales is None else (prepared.x, prepared.scales)
        check_equal_rows(rows, received.recv_x)
        assert prepared.num_tokens_per_expert == received.num_recv_tokens_per_expert
        assert reference.calc_diff(output, dense) < COMBINE_BOUND


def look_up_configs(group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """The rank counts that replaced lookups were asked for, with and without a config given."""
    asked: list[int] = []

    def fake(num_ranks: int) -> deep_ep.Config:
        asked.append(num_ranks)
        return deep_ep.Config(2)

    class Patched(deep_ep.Buffer):
        get_dispatch_config = staticmethod(fake)
        get_combine_config = staticmethod(fake)

    with Patched(group) as buffer:
        one_round(buffer, None)
        without = list(asked)
        one_round(buffer, deep_ep.Config(4))
    return without, asked[len(without) :]


def one_round(buffer: deep_ep.Buffer, config: deep_ep.Config | None) -> None:
    topk_idx = torch.arange(buffer.group_size)[:, None]
    per_rank, _, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(
        topk_idx, buffer.group_size
    )
    x = torch.ones((len(topk_idx), 8), dtype=torch.bfloat16)
    recv_x, _, _, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=is_token_in_rank,
        num_tokens_per_expert=per_expert,
        config=config,
    )
    assert torch.equal(buffer.combine(recv_x, handle, config=config)[0], x)


def test_configs_are_looked_up_at_call_time(pool: Pool) -> None:
    for without, given in pool.run(look_up_configs):
        assert without == [4, 4]
        assert given == []


def replace_on_the_class(group: dist.ProcessGroup) -> int:
    """A client that replaces the lookup on the class itself, for all buffers."""
    asked: list[int] = []
    theirs = deep_ep.Buffer.get_dispatch_config
    deep_ep.Buffer.get_dispatch_config = staticmethod(
        lambda num_ranks: asked.append(num_ranks) or theirs(num_ranks)
    )
    try:
        with deep_ep.Buffer(group) as buffer:
            one_round(buffer, None)
    finally:
        deep_ep.Buffer.get_dispatch_config = staticmethod(theirs)
    return len(asked)


def test_a_lookup_replaced_on_the_class_is_obeyed(pool: Pool) -> None:
    assert pool.run(replace_on_the_class, num_ranks=2) == [1, 1]


def odd_defaults(group: dist.ProcessGroup) -> tuple[torch.dtype, ...]:
    """Clients set the default dtype to bf16 before they call anything."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        seen = plain_sequence(group, make_world("uniform", group.size()), False, False, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    return seen.recv_idx.dtype, seen.recv_weights.dtype, seen.combined_weights.dtype


def test_default_dtype_does_not_matter(pool: Pool) -> None:
    assert pool.run(odd_defaults, num_ranks=2) == [(torch.int64, torch.float32, torch.float32)] * 2


def turns_down(call: Callable[[], object]) -> bool:
    try:
        call()
    except TypeError:
        return True
    return False


def probe(group: dist.ProcessGroup) -> list[bool]:
    """Whether arguments of a later interface are turned down as clients expect it."""
    x = torch.ones((1, 8), dtype=torch.bfloat16)
    with deep_ep.Buffer(group) as buffer:
        return [
            turns_down(lambda: deep_ep.Buffer(group, num_max_tokens_per_rank=1)),
            turns_down(lambda: buffer.dispatch(x, num_sms=8)),
            turns_down(lambda: buffer.combine(x, (), num_sms=8)),
        ]


def test_clients_that_probe_get_a_type_error(pool: Pool) -> None:
    assert pool.run(probe, num_ranks=2) == [[True, True, True]] * 2
