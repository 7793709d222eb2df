"""Training over ranks in processes of their own, against a dense copy; the demo, in small."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossdock import Buffer, MissingDependencyError, cli
from crossdock.cli.demo import BOUND, verdict
from crossdock.cli.demo_model import ByteModel, Settings
from crossdock.cli.demo_picture import Story, draw
from crossdock.cli.demo_training import Job, Outcome, SelfCheck, Step, train
from crossdock.nn import MoELayer, MoEOutput, replicated_parameters

HIDDEN, NUM_EXPERTS = 10, 12
SIZES = {"intermediate": 6, "top_k": 3, "shared_intermediate": 4}

Wrap = Callable[[MoELayer], Callable[[Tensor], MoEOutput]]


def plain(moe: MoELayer) -> Callable[[Tensor], MoEOutput]:
    return moe


def checkpointed(moe: MoELayer) -> Callable[[Tensor], MoEOutput]:
    return lambda x: checkpoint(moe, x, use_reentrant=False)


def compiled(moe: MoELayer) -> Callable[[Tensor], MoEOutput]:
    torch.compiler.reset()
    return torch.compile(moe, backend="aot_eager")


def tokens(num_tokens: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, HIDDEN, generator=generator).requires_grad_()


def objective(output: MoEOutput) -> Tensor:
    """A sum over tokens, so that ranks add up, with a different slope in every column."""
    slope = torch.arange(1, HIDDEN + 1, dtype=torch.float32)
    return (output.x * slope).sum() + output.x.square().sum() + output.aux_loss


def crowd(moe: MoELayer, expert: int) -> None:
    """Make every token choose `expert` and its neighbours, whatever the token."""
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[expert : expert + moe.router.top_k] = 1e-3


class Gradients(NamedTuple):
    """What one rank found; `parameters` summed over the ranks where they are replicated."""

    x: Tensor
    parameters: dict[str, Tensor]


def gradients(group, num_tokens, transport, wrap: Wrap, crowded: int | None) -> Gradients:
    rank = group.rank()
    with Buffer(group, transport=transport, timeout_s=20) as buffer:
        moe = MoELayer(HIDDEN, NUM_EXPERTS, buffer=buffer, **SIZES)
        if crowded is not None:
            crowd(moe, crowded)
        x = tokens(num_tokens[rank], seed=rank)
        objective(wrap(moe)(x)).backward()
        for parameter in replicated_parameters(moe):
            dist.all_reduce(parameter.grad, group=group)
        found = {name: parameter.grad for name, parameter in moe.named_parameters()}
        return Gradients(x.grad, found)


def check_against_dense(results: list[Gradients], num_tokens, crowded: int | None) -> None:
    dense = MoELayer(HIDDEN, NUM_EXPERTS, **SIZES)
    if crowded is not None:
        crowd(dense, crowded)
    for rank, result in enumerate(results):
        x = tokens(num_tokens[rank], seed=rank)
        objective(dense(x)).backward()
        torch.testing.assert_close(result.x, x.grad)
    for name, parameter in dense.named_parameters():
        parts = [result.parameters[name] for result in results]
        for part in parts:
            found = torch.cat(parts) if name.startswith("experts.") else part
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transport", ["one_sided", "collective"])
@pytest.mark.parametrize(
    ("num_tokens", "crowded"),
    [
        pytest.param([16, 16, 16, 16], None, id="even"),
        pytest.param([3, 40, 0, 17], None, id="one rank without tokens"),
        pytest.param([0, 0, 0, 0], None, id="nobody"),
        pytest.param([5, 6, 0, 8], 3, id="all to one rank"),
        pytest.param([7, 2, 4], None, id="three ranks"),
        pytest.param([9], None, id="alone"),
    ],
)
def test_gradients_are_those_of_a_dense_copy(pool, transport, num_tokens, crowded):
    args = (num_tokens, transport, plain, crowded)
    results = pool.run(gradients, *args, num_ranks=len(num_tokens))
    check_against_dense(results, num_tokens, crowded)


def test_gradients_are_those_of_a_dense_copy_with_checkpointing(pool):
    num_tokens = [8, 0, 5, 11]
    results = pool.run(gradients, num_tokens, None, checkpointed, None)
    check_against_dense(results, num_tokens, None)


def test_gradients_are_those_of_a_dense_copy_when_compiled(pool):
    num_tokens = [0, 9]
    args = (num_tokens, None, compiled, None)
    results = pool.run(gradients, *args, num_ranks=2, timeout_s=100.0)
    check_against_dense(results, num_tokens, None)


def slopes(group) -> tuple[float, float]:
    """Of the whole world's objective, along one random direction: by gradients, by differences."""
    rank = group.rank()
    with Buffer(group, timeout_s=20) as buffer:
        moe = MoELayer(HIDDEN, NUM_EXPERTS, buffer=buffer, **SIZES)
        spread = [parameter for name, parameter in moe.named_parameters() if "experts." in name]
        x = tokens(6 * rank, seed=rank)
        leaves = [x, *spread]
        generator = torch.Generator().manual_seed(100 + rank)
        direction = [torch.randn(leaf.shape, generator=generator) for leaf in leaves]

        def world(step: float) -> Tensor:
            with torch.no_grad():
                for leaf, change in zip(leaves, direction, strict=True):
                    leaf.add_(change, alpha=step)
                value = objective(moe(x)).double()
                for leaf, change in zip(leaves, direction, strict=True):
                    leaf.sub_(change, alpha=step)
            dist.all_reduce(value, group=group)
            return value

        found = torch.autograd.grad(objective(moe(x)), leaves)
        slope = sum((g * d).sum().double() for g, d in zip(found, direction, strict=True))
        dist.all_reduce(slope, group=group)
        return slope.item(), ((world(1e-3) - world(-1e-3)) / 2e-3).item()


def test_the_worlds_slope_is_what_differences_say(pool):
    for by_gradients, by_differences in pool.run(slopes):
        assert by_gradients == pytest.approx(by_differences, rel=1e-2)


def losses(group, num_steps: int) -> list[float]:
    """The world's objective, step by step, while all parameters are trained."""
    with Buffer(group, timeout_s=20) as buffer:
        moe = MoELayer(HIDDEN, NUM_EXPERTS, buffer=buffer, **SIZES)
        x = tokens(4 + group.rank(), seed=group.rank())
        return descend(moe, [x], num_steps, group)


def descend(moe: MoELayer, xs: list[Tensor], num_steps: int, group=None) -> list[float]:
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-4)
    found = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = torch.stack([objective(moe(x)) for x in xs]).sum()
        loss.backward()
        if group is not None:
            for tensor in (loss.detach(), *(p.grad for p in replicated_parameters(moe))):
                dist.all_reduce(tensor, group=group)
        optimizer.step()
        found.append(loss.item())
    return found


def test_training_takes_the_same_way_as_a_dense_copy(pool):
    dense = MoELayer(HIDDEN, NUM_EXPERTS, **SIZES)
    expected = descend(dense, [tokens(4 + rank, seed=rank) for rank in range(4)], 12)
    assert expected[-1] < expected[0] - 1
    for found in pool.run(losses, 12):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def forgetful(group) -> Gradients:
    """As `gradients`, but the weights' gradients of one rank are lost on their way back."""
    rank = group.rank()
    with Buffer(group, timeout_s=20) as buffer:
        moe = MoELayer(HIDDEN, NUM_EXPERTS, buffer=buffer, **SIZES)
        x = tokens(5, seed=rank)
        objective(moe(x)).backward()
        for parameter in replicated_parameters(moe):
            if rank == 1:
                parameter.grad.zero_()
            dist.all_reduce(parameter.grad, group=group)
        return Gradients(x.grad, {name: p.grad for name, p in moe.named_parameters()})


def test_a_lost_gradient_is_seen(pool):
    results = pool.run(forgetful)
    with pytest.raises(AssertionError):
        check_against_dense(results, [5, 5, 5, 5], None)


def demonstrate(group, job: Job) -> Outcome:
    return train(group.rank(), group.size(), job)


def test_the_demo_learns_checks_itself_and_draws(pool, tmp_path):
    text = Path(importlib.util.__file__).read_bytes() * 4
    settings = Settings(num_experts=8, top_k=2, hidden=32, intermediate=16, context=32)
    progress = tmp_path / "steps"
    outcomes = pool.run(demonstrate, Job(settings, 40, text, progress))

    steps = [Step(*json.loads(line)) for line in progress.read_text().splitlines()]
    assert [step.number for step in steps] == list(range(1, 41))
    assert outcomes[0].held_out_loss < steps[0].loss - 1
    num_choices = 4 * settings.batch * settings.context * settings.top_k
    for step in steps:
        assert [sum(counts) for counts in step.num_tokens_per_expert] == [num_choices] * 2

    passed, line = verdict(outcomes)
    assert passed, line
    assert f"bound {BOUND:.0e}" in line
    assert max(outcome.self_check.difference for outcome in outcomes) > 0

    picture = tmp_path / "picture"
    draw(Story(steps, 4, settings.top_k, text, outcomes[0].held_out_loss), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def demonstrate_wrongly(group, job: Job) -> Outcome:
    """The same, with one expert of the dense copy off by a thousandth."""
    copy = ByteModel.dense_copy

    def wrong_copy(model: ByteModel) -> ByteModel:
        dense = copy(model)
        with torch.no_grad():
            dense.blocks[0].moe.experts.up[0] *= 1.001
        return dense

    with mock.patch.object(ByteModel, "dense_copy", wrong_copy):
        return demonstrate(group, job)


def test_the_demo_notices_a_weight_that_is_off_by_a_thousandth(pool, tmp_path):
    settings = Settings(num_experts=4, top_k=2, hidden=32, intermediate=16, context=32)
    text = Path(importlib.util.__file__).read_bytes() * 4
    outcomes = pool.run(demonstrate_wrongly, Job(settings, 1, text, tmp_path / "steps"))
    passed, line = verdict(outcomes)
    assert not passed, line


@pytest.mark.parametrize("difference", [2 * BOUND, float("nan")])
def test_the_demo_says_when_a_rank_differs(difference):
    right, wrong = (Outcome(2.0, SelfCheck(19, d, "head.weight")) for d in (0.0, difference))
    passed, line = verdict([right, wrong])
    assert not passed
    assert "FAILED" in line
    assert f"{difference:.1e}" in line


def test_the_command_line_says_what_is_missing(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name)
    )
    with pytest.raises(MissingDependencyError, match=r'rich .* pip install "crossdock\[cli\]"'):
        cli.main()
