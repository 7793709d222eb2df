"""What each rank of `crossdock demo` does: train its share, and compare with a dense copy.

The experts are spread over the ranks, everything else is replicated, and each rank trains on its
own part of every batch; one all-reduce a step keeps what is replicated equal. How a run is started,
shown and drawn is the business of `demo.py`.

Symbols: B sequences, C context, R ranks, E experts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from crossdock.buffer import Buffer
from crossdock.cli.demo_model import ByteModel, Settings
from crossdock.nn import replicated_parameters

__all__ = ["Job", "Outcome", "SelfCheck", "Step", "train"]

_PIECE, _HELD_OUT_EVERY = 8192, 20
"""Of every twenty pieces of the text, in bytes, training does not see the first."""

_AUX_WEIGHT = 0.03
_LEARNING_RATE = 0.01
_WARM_UP_STEPS = 20
_HELD_OUT_BATCHES = 8


class Job(NamedTuple):
    """What all ranks are asked to do; rank 0 tells each step in the file `progress`."""

    settings: Settings
    num_steps: int
    text: bytes
    progress: Path


class Step(NamedTuple):
    """One step: loss in nats per byte, and counts [blocks][E] of all ranks."""

    number: int
    loss: float
    tokens_per_s: float
    num_tokens_per_expert: list[list[int]]


class SelfCheck(NamedTuple):
    """One rank's comparison of the world's model with a dense copy in its own process.

    Attributes:
        num_gradients: how many parameters' gradients were compared, besides the loss.
        difference: the largest of `max |a - b| / max |b|` over the loss and these gradients.
        where: in what it was found.
    """

    num_gradients: int
    difference: float
    where: str


class Outcome(NamedTuple):
    """What a rank says in the end; the loss is that of text never seen in training."""

    held_out_loss: float
    self_check: SelfCheck


def train(rank: int, num_ranks: int, job: Job) -> Outcome:
    """Train, tell each step, and check.

    **Collective**: all ranks of the default process group.
    """
    data = torch.frombuffer(bytearray(job.text), dtype=torch.uint8)
    pieces = data.split(_PIECE)
    held_out = torch.cat(pieces[::_HELD_OUT_EVERY])
    seen = torch.cat([piece for i, piece in enumerate(pieces) if i % _HELD_OUT_EVERY])
    with Buffer() as buffer:
        model = ByteModel.spread(job.settings, buffer)
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        for number in range(job.num_steps):
            started = time.perf_counter()
            _set_learning_rate(optimizer, number, job.num_steps)
            batch = _batch(seen, job.settings, seed=number * num_ranks + rank)
            loss, counts = _step(model, optimizer, batch)
            speed = num_ranks * batch[:, 1:].numel() / (time.perf_counter() - started)
            if rank == 0:
                _tell(job.progress, Step(number + 1, loss, speed, counts))
        seeds = range(rank, _HELD_OUT_BATCHES * num_ranks, num_ranks)
        unseen = [_batch(held_out, job.settings, seed=seed) for seed in seeds]
        return Outcome(_mean_loss(model, unseen), _self_check(model, held_out, rank=rank))


class _Share(NamedTuple):
    """One rank's share of a batch; the shares of all ranks add up to the batch's mean."""

    objective: Tensor
    loss: Tensor
    counts: Tensor


def _share(model: ByteModel, batch: Tensor) -> _Share:
    logits, aux_loss, counts = model(batch[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    num_ranks = dist.get_world_size()
    return _Share((loss + _AUX_WEIGHT * aux_loss) / num_ranks, loss / num_ranks, counts)


def _step(
    model: ByteModel, optimizer: torch.optim.Optimizer, batch: Tensor
) -> tuple[float, list[list[int]]]:
    """Train on one batch; returns the loss and the experts' counts over all ranks."""
    model.zero_grad()
    share = _share(model, batch)
    share.objective.backward()
    loss, counts = share.loss.detach(), share.counts.float()
    _sum_over_ranks([*_replicated_gradients(model), loss, counts])
    optimizer.step()
    return loss.item(), counts.long().tolist()


def _replicated_gradients(model: ByteModel) -> list[Tensor]:
    return [_gradient(parameter) for parameter in replicated_parameters(model)]


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """In place, all of them in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _set_learning_rate(optimizer: torch.optim.Optimizer, number: int, num_steps: int) -> None:
    """A linear start, then half a cosine down to a tenth."""
    falling = 0.55 + 0.45 * math.cos(math.pi * number / num_steps)
    for group in optimizer.param_groups:
        group["lr"] = _LEARNING_RATE * min(1.0, (number + 1) / _WARM_UP_STEPS) * falling


def _batch(data: Tensor, settings: Settings, *, seed: int) -> Tensor:
    """Pieces of the text [B, C + 1] int64, the same for the same seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    last = len(data) - settings.context
    starts = torch.randint(
        last, (settings.batch, 1), generator=generator, dtype=torch.int64, device="cpu"
    )
    return data[starts + torch.arange(settings.context + 1, dtype=torch.int64, device="cpu")].long()


def _tell(progress: Path, step: Step) -> None:
    with progress.open("a", encoding="utf-8") as file:
        file.write(json.dumps(step) + "\n")


@torch.no_grad()
def _mean_loss(model: ByteModel, batches: Sequence[Tensor]) -> float:
    losses = torch.stack([_share(model, batch).loss for batch in batches])
    dist.all_reduce(losses)
    return losses.mean().item()


def _self_check(model: ByteModel, data: Tensor, *, rank: int) -> SelfCheck:
    """Loss and gradients of one batch, by the world and by a dense copy alone.

    A sequence for each rank: the more tokens, the likelier that two experts score alike for one of
    them to the last digits, so that either choice is right.
    """
    num_ranks = dist.get_world_size()
    batches = [_batch(data, model.settings, seed=seed)[:1] for seed in range(num_ranks)]
    dense = model.dense_copy()
    dense_loss = _with_gradients(dense, batches)
    loss = _with_gradients(model, batches[rank : rank + 1])
    _sum_over_ranks([loss, *_replicated_gradients(model)])
    differences = {"the loss": _difference(loss, dense_loss, of=dense_loss)}
    for name, parameter in model.named_parameters():
        whole = _gradient(dense.get_parameter(name))
        own = whole.chunk(num_ranks)[rank] if ".experts." in name else whole
        differences[name] = _difference(_gradient(parameter), own, of=whole)
    where = max(differences, key=differences.__getitem__)
    return SelfCheck(len(differences) - 1, differences[where], where)


def _with_gradients(model: ByteModel, batches: Sequence[Tensor]) -> Tensor:
    """The sum of the batches' losses; their gradients are left in the parameters."""
    model.zero_grad()
    shares = [_share(model, batch) for batch in batches]
    torch.stack([share.objective for share in shares]).sum().backward()
    return torch.stack([share.loss.detach() for share in shares]).sum()


def _difference(a: Tensor, b: Tensor, *, of: Tensor) -> float:
    return ((a - b).abs().max() / of.abs().max()).item()
