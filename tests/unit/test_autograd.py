"""Dispatch and combine as differentiable operations: one rank, and ranks as threads."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossdock import Buffer, HandleError, PeerTimeoutError
from crossdock.autograd import buffer_key, combine, dispatch
from crossdock.transports.loopback import run_threads

TOPK_IDX = torch.tensor([[0, 3], [1, -1], [-1, -1], [2, 2], [3, 1]], dtype=torch.int64)
NUM_EXPERTS = 4
HIDDEN = 3


@pytest.fixture
def buffer():
    with Buffer() as made:
        yield made


def tokens(num_tokens: int = 5, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float32)
    return x.requires_grad_()


def weights(*, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = TOPK_IDX.shape
    return torch.rand(shape, generator=generator, dtype=torch.float32).requires_grad_()


def through(x: Tensor, topk_weights: Tensor, buffer: Buffer | int) -> Tensor:
    """Every row squared, times the weights of its slots, and back."""
    received = dispatch(
        x, buffer, topk_idx=TOPK_IDX, topk_weights=topk_weights, num_experts=NUM_EXPERTS
    )
    rows = received.x.square() * received.topk_weights.sum(1, keepdim=True)
    return combine(rows, buffer, handle=received.handle)


def expected(x: Tensor, topk_weights: Tensor) -> Tensor:
    """The same on one rank, without any exchange."""
    return x.square() * topk_weights.where(TOPK_IDX >= 0, 0.0).sum(1, keepdim=True)


def gradients(output: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    slope = torch.arange(output.numel(), dtype=torch.float32).view(output.shape)
    return torch.autograd.grad((output * slope).sum(), of)


def test_forward_and_gradients_of_one_rank(buffer):
    x, w = tokens(), weights()
    output = through(x, w, buffer)
    torch.testing.assert_close(output, expected(x, w))
    torch.testing.assert_close(gradients(output, x, w), gradients(expected(x, w), x, w))


def test_gradients_agree_with_finite_differences(buffer):
    def single(x: Tensor, w: Tensor) -> Tensor:
        return through(x.float(), w.float(), buffer).double()

    x, w = (leaf.detach().double().requires_grad_() for leaf in (tokens(), weights()))
    assert torch.autograd.gradcheck(single, (x, w), eps=1e-2, atol=1e-3, rtol=1e-3)


def test_second_derivatives_go_through_the_operations_again(buffer):
    x, w = tokens(), weights()

    def second(output: Tensor) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, w))

    torch.testing.assert_close(second(through(x, w, buffer)), second(expected(x, w)))


def test_gradient_of_a_weight_that_is_not_local_is_zero(buffer):
    w = weights()
    received = dispatch(
        tokens(), buffer, topk_idx=TOPK_IDX, topk_weights=w, num_experts=NUM_EXPERTS
    )
    (gradient,) = torch.autograd.grad(received.topk_weights.sum(), w)
    assert torch.equal(gradient, (TOPK_IDX >= 0).float())


def test_weights_travel_back_and_so_do_their_gradients(buffer):
    x, w = tokens(), weights()
    received = dispatch(x, buffer, topk_idx=TOPK_IDX, topk_weights=w, num_experts=NUM_EXPERTS)
    output, returned = combine(
        received.x, buffer, handle=received.handle, topk_weights=received.topk_weights * 3
    )
    torch.testing.assert_close(returned, (3 * w).where(TOPK_IDX >= 0, 0.0))
    slope = torch.arange(10, dtype=torch.float32).view(5, 2)
    loss = (returned * slope).sum() + output.sum()
    grad_x, grad_w = torch.autograd.grad(loss, (x, w))
    torch.testing.assert_close(grad_w, (3 * slope).where(TOPK_IDX >= 0, 0.0))
    torch.testing.assert_close(grad_x, (TOPK_IDX >= 0).any(1, keepdim=True).float().expand(5, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_what_they_belong_to(buffer, dtype):
    x = tokens().detach().to(dtype).requires_grad_()
    w = weights().detach().to(dtype).requires_grad_()
    received = dispatch(x, buffer, topk_idx=TOPK_IDX, topk_weights=w, num_experts=NUM_EXPERTS)
    assert received.topk_weights.dtype == torch.float32
    output = combine(received.x, buffer, handle=received.handle)
    grad_x, grad_w = torch.autograd.grad(output.sum() + received.topk_weights.sum(), (x, w))
    assert output.dtype == grad_x.dtype == grad_w.dtype == dtype


def test_a_bare_handle_of_the_buffer_will_do(buffer):
    to_rank, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(TOPK_IDX, NUM_EXPERTS)
    x = tokens()
    rows, *_, handle, _ = buffer.dispatch(
        x.detach(),
        num_tokens_per_rank=to_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=to_expert,
    )
    rows.requires_grad_()
    output = combine(rows, buffer, handle=tuple(handle))
    (gradient,) = torch.autograd.grad(output.sum(), rows)
    assert torch.equal(gradient, torch.ones_like(rows))


def test_without_gradients_nothing_is_recorded(buffer):
    with torch.no_grad():
        output = through(tokens(), weights(), buffer)
    assert not output.requires_grad
    assert not through(tokens().detach(), weights().detach(), buffer).requires_grad


def test_checkpointing_sends_twice_and_changes_nothing(buffer):
    x, w = tokens(), weights()
    output = checkpoint(through, x, w, buffer, use_reentrant=False)
    torch.testing.assert_close(gradients(output, x, w), gradients(expected(x, w), x, w))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_break(buffer, backend):
    torch.compiler.reset()
    compiled = torch.compile(through, backend=backend, fullgraph=True)
    x, w = tokens(), weights()
    output = compiled(x, w, buffer_key(buffer))
    torch.testing.assert_close(output, expected(x, w))
    torch.testing.assert_close(gradients(output, x, w), gradients(expected(x, w), x, w))


# After a break the compiler looks at `.grad` of every tensor, and hides the warning from its users.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiles_with_the_buffer_itself(buffer):
    torch.compiler.reset()
    compiled = torch.compile(through, backend="aot_eager")
    x, w = tokens(), weights()
    torch.testing.assert_close(compiled(x, w, buffer), expected(x, w))


def test_fake_kernels_keep_to_the_real_ones(buffer):
    x, w = tokens(), weights()
    key = buffer_key(buffer)
    received = dispatch(x, buffer, topk_idx=TOPK_IDX, topk_weights=w, num_experts=NUM_EXPERTS)
    handle = [tensor.detach() for tensor in received.handle]
    handle[-1].requires_grad_()
    rows = received.x.detach().clone().requires_grad_()
    ops = torch.ops.crossdock
    calls = [
        (ops.dispatch, (x, TOPK_IDX, w), {"num_experts": NUM_EXPERTS, "key": key}),
        (ops.resend, (x, handle[:6]), {"key": key}),
        (ops.combine, (rows, received.topk_weights.detach(), handle[:6]), {"key": key}),
        (ops.combine, (rows, None, handle), {"key": key}),
    ]
    for op, args, kwargs in calls:
        torch.library.opcheck(op.default, args, kwargs)


def test_a_buffer_keeps_its_key_and_is_not_kept_alive():
    first, second = Buffer(), Buffer()
    key = buffer_key(first)
    assert buffer_key(first) == key == buffer_key(key)
    assert buffer_key(second) != key
    first.destroy()
    del first
    gc.collect()
    with pytest.raises(HandleError, match="gone"):
        through(tokens(), weights(), key)
    assert through(tokens(), weights(), second).shape == (5, HIDDEN)


def all_to_last(comm, *, keep_tie: bool) -> tuple[Tensor, Tensor | None]:
    """Every token to the last rank's experts; rank 0 has none, and nothing that needs gradients."""
    with Buffer(comm=comm, transport="loopback", timeout_s=2, first_call_timeout_s=2) as buffer:
        num_tokens = 4 * min(buffer.rank, 1)
        x = tokens(num_tokens, seed=buffer.rank) if num_tokens else torch.empty(0, HIDDEN)
        num_experts = NUM_EXPERTS * buffer.group_size
        received = dispatch(
            x,
            buffer,
            topk_idx=torch.full((num_tokens, 2), num_experts - 1, dtype=torch.int64),
            topk_weights=torch.ones(num_tokens, 2),
            num_experts=num_experts,
        )
        # What a careless layer does: where nothing was received it returns something of its own.
        rows = 2 * received.x if received.x.shape[0] else torch.empty(0, HIDDEN)
        handle = received.handle if keep_tie else received.handle[:-1]
        combine(rows, buffer, handle=handle).square().sum().backward()
    return x.detach(), x.grad


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_without_tokens_or_rows_take_part_in_backward(num_ranks):
    results = run_threads(num_ranks, partial(all_to_last, keep_tie=True))
    for x, gradient in results[1:]:
        torch.testing.assert_close(gradient, 8 * x)


def test_without_the_tie_a_careless_layer_leaves_its_peers_waiting():
    with pytest.raises(PeerTimeoutError):
        run_threads(2, partial(all_to_last, keep_tie=False))
