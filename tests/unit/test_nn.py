"""The mixture-of-experts layer: its arithmetic, its router, and ranks as threads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from crossdock import Buffer, ConfigError
from crossdock.nn import MoELayer, replicated_parameters
from crossdock.transports.loopback import run_threads

HIDDEN, NUM_EXPERTS = 6, 8
SIZES = {"intermediate": 5, "top_k": 2}


def layer(**changed) -> MoELayer:
    return MoELayer(HIDDEN, NUM_EXPERTS, **{**SIZES, **changed})


def tokens(num_tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()


def by_hand(moe: MoELayer, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for token in x:
        logits = moe.router.weight @ token
        scores = logits.softmax(0) if moe.router.score == "softmax" else logits.sigmoid()
        chosen = scores.argsort(descending=True)[: moe.router.top_k]
        total = scores[chosen].sum() if moe.router.renormalize else 1.0
        row = sum(scores[e] / total * expert(moe.experts, e, token) for e in chosen)
        rows.append(row if moe.shared is None else row + expert(moe.shared, 0, token))
    return torch.stack(rows)


def expert(experts, index, token: Tensor) -> Tensor:
    gate, up, down = experts.gate[index], experts.up[index], experts.down[index]
    return down @ (silu(gate @ token) * (up @ token))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("shared_intermediate", [0, 4])
@pytest.mark.parametrize("has_buffer", [True, False])
def test_output_and_gradients_by_hand(score, renormalize, shared_intermediate, has_buffer):
    moe = layer(
        score=score,
        renormalize=renormalize,
        shared_intermediate=shared_intermediate,
        buffer=Buffer() if has_buffer else None,
    )
    x = tokens(7)
    leaves = [x, *moe.parameters()]
    output, expected = moe(x).x, by_hand(moe, x)
    torch.testing.assert_close(output, expected)
    slope = tokens(7, seed=9).detach()
    found = torch.autograd.grad((output * slope).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((expected * slope).sum(), leaves))


def test_gradients_agree_with_finite_differences():
    moe = layer(dtype=torch.float64, shared_intermediate=3)
    x = tokens(5, dtype=torch.float64)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        output = moe(x)
        return output.x, output.aux_loss

    assert torch.autograd.gradcheck(run, (x,))


def test_any_leading_dimensions_and_none():
    moe = layer()
    x = tokens(6)
    torch.testing.assert_close(moe(x.view(2, 3, HIDDEN)).x.view(6, HIDDEN), moe(x).x)
    nothing = moe(x[:0])
    assert nothing.x.shape == (0, HIDDEN)
    assert nothing.aux_loss == 0
    nothing.x.sum().backward()
    assert all(not parameter.grad.any() for parameter in moe.parameters())


def test_experts_without_tokens_have_a_gradient_of_zero():
    moe = layer(top_k=1)
    moe(tokens(1)).x.sum().backward()
    used = moe.experts.gate.grad.flatten(1).any(1)
    assert used.sum() == 1


def test_statistics_of_even_and_of_lopsided_routing():
    moe = layer(top_k=1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:HIDDEN, :HIDDEN] = 50 * torch.eye(HIDDEN)
    lopsided = moe(torch.eye(HIDDEN)[:1].repeat(12, 1))
    assert lopsided.num_tokens_per_expert.tolist() == [12] + [0] * 7
    torch.testing.assert_close(lopsided.aux_loss.detach(), torch.tensor(float(NUM_EXPERTS)))
    six_of_eight = moe(torch.eye(HIDDEN))
    assert six_of_eight.num_tokens_per_expert.tolist() == [1] * 6 + [0] * 2
    torch.testing.assert_close(six_of_eight.aux_loss.detach(), torch.tensor(NUM_EXPERTS / 6))


def test_the_auxiliary_loss_evens_out_the_load():
    moe = layer(top_k=1, seed=3)
    x = tokens(256).detach() + 1.5
    optimizer = torch.optim.SGD(moe.router.parameters(), lr=0.5)
    before = moe(x)
    for _ in range(60):
        optimizer.zero_grad()
        moe(x).aux_loss.backward()
        optimizer.step()
    after = moe(x)
    assert after.aux_loss < before.aux_loss
    assert after.num_tokens_per_expert.max() < before.num_tokens_per_expert.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_output_have_the_callers_dtype(dtype):
    moe = layer(dtype=dtype, buffer=Buffer(), shared_intermediate=4)
    assert {parameter.dtype for parameter in moe.parameters()} == {dtype}
    assert moe(tokens(3, dtype=dtype)).x.dtype == dtype


def test_default_dtype_and_random_state_of_the_caller_do_not_matter():
    expected = layer().state_dict()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = layer().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in expected.items():
        assert torch.equal(value, other[name])


def test_every_matrix_starts_differently():
    moe = MoELayer(4, 3, intermediate=4, top_k=1, shared_intermediate=4)
    matrices = [m for p in (*moe.experts.parameters(), *moe.shared.parameters()) for m in p]
    firsts = {matrix[0, 0].item() for matrix in [*matrices, moe.router.weight]}
    assert len(firsts) == 3 * (3 + 1) + 1
    other = MoELayer(4, 3, intermediate=4, top_k=1, seed=1)
    assert not torch.equal(moe.experts.gate, other.experts.gate)


@pytest.mark.parametrize("top_k", [0, 9])
def test_impossible_top_k(top_k):
    with pytest.raises(ConfigError, match="top_k"):
        layer(top_k=top_k)


def test_experts_that_cannot_be_divided():
    def build(comm):
        with Buffer(comm=comm, transport="loopback") as buffer:
            layer(buffer=buffer)

    with pytest.raises(ConfigError, match="8 experts cannot be divided among 3"):
        run_threads(3, build)


def test_checkpointing_changes_nothing():
    moe = layer(buffer=Buffer())
    x = tokens(9)
    leaves = [x, *moe.parameters()]
    plain = torch.autograd.grad(moe(x).x.square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(moe, x, use_reentrant=False).x.square().sum(), leaves)
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


# After a break the compiler looks at `.grad` of every tensor, and hides the warning from its users.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_changes_nothing(backend):
    torch.compiler.reset()
    moe = layer(buffer=Buffer())
    x = tokens(9)
    leaves = [x, *moe.parameters()]
    plain = torch.autograd.grad(moe(x).x.square().sum(), leaves)
    output = torch.compile(moe, backend=backend)(x)
    torch.testing.assert_close(plain, torch.autograd.grad(output.x.square().sum(), leaves))


def test_replicated_parameters_are_all_but_spread_experts():
    spread, alone = layer(buffer=Buffer(), shared_intermediate=4), layer()
    model = torch.nn.Sequential(spread, alone)
    found = {id(parameter) for parameter in replicated_parameters(model)}
    own = {id(parameter) for parameter in spread.experts.parameters()}
    assert found == {id(parameter) for parameter in model.parameters()} - own


def one_rank(comm, num_tokens: list[int], score: str):
    """One step's gradients of this rank, and the dense copy."""
    with Buffer(comm=comm, transport="loopback") as buffer:
        moe = layer(buffer=buffer, score=score, shared_intermediate=4)
        x = tokens(num_tokens[buffer.rank], seed=buffer.rank)
        output = moe(x)
        (output.x.square().sum() + output.aux_loss).backward()
        for parameter in replicated_parameters(moe):
            parameter.grad = sum(comm.allgather(parameter.grad))
        return output.x.detach(), x.grad, moe, moe.dense_copy()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_tokens", [[5], [4, 7], [0, 3], [5, 0, 9, 1], [0, 0, 0, 0]])
def test_ranks_together_do_what_a_dense_copy_does(num_tokens, score):
    results = run_threads(len(num_tokens), lambda comm: one_rank(comm, num_tokens, score))
    dense = layer(score=score, shared_intermediate=4)
    for rank, (output, grad_x, _, copied) in enumerate(results):
        for name, value in dense.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value), name
        x = tokens(num_tokens[rank], seed=rank)
        expected = dense(x)
        (expected.x.square().sum() + expected.aux_loss).backward()
        torch.testing.assert_close(output, expected.x)
        torch.testing.assert_close(grad_x, x.grad)
    for name, parameter in dense.named_parameters():
        parts = [moe.get_parameter(name).grad for _, _, moe, _ in results]
        found = torch.cat(parts) if name.startswith("experts.") else parts[0]
        torch.testing.assert_close(found, parameter.grad, msg=name)


def test_a_dense_copy_is_its_own():
    moe = layer()
    dense = copy.deepcopy(moe.state_dict())
    copied = moe.dense_copy()
    with torch.no_grad():
        copied.experts.gate.zero_()
    assert torch.equal(moe.experts.gate, dense["experts.gate"])
