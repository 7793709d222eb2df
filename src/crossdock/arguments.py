"""What callers may pass: checks of shapes and dtypes, made once, before anything is sent.

Only what can be known without looking at values of a device is checked, so a check never waits.
Whoever calls decides what to do about an error: the peers have to hear of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from crossdock import _env
from crossdock.codec import Tokens, format_of, metas
from crossdock.errors import ConfigError, RankMismatchError, ShapeError
from crossdock.handle import Handle
from crossdock.low_latency_arguments import LowLatencyOptions
from crossdock.routing import RoutingShare, check_expert_ids
from crossdock.shapes import Meta, check_meta, check_tensor, meta
from crossdock.topology import Topology, num_local_experts
from crossdock.transports.session import Timeouts

__all__ = [
    "BufferArguments",
    "DispatchArguments",
    "checked_bias",
    "checked_wait_stats",
    "flat_rows",
]

_COMBINED = (torch.bfloat16, torch.float16, torch.float32)
_REMEMBERED = 1024
"""Kinds of calls whose checks are remembered."""


class DispatchArguments(NamedTuple):
    """The arguments of a first dispatch, as they came."""

    is_token_in_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    expert_alignment: int
    num_worst_tokens: int

    def checked(self, x: Tokens, *, num_ranks: int) -> RoutingShare:
        """What this rank will tell the others.

        Raises:
            ShapeError: a tensor has the wrong shape or dtype, or is missing.
            ConfigError: arguments that do not go together.
        """
        in_rank, per_expert, topk_idx, weights = tensors = self[:4]
        _check_dispatch(metas(x), tuple(map(meta, tensors)), (*self[4:], num_ranks))
        if in_rank is None or per_expert is None:  # which has been refused
            raise ShapeError("is_token_in_rank", got=None, expected="a tensor")
        if topk_idx is not None:
            check_expert_ids(topk_idx, per_expert.shape[0])
            if _env.debug():
                _check_presence(topk_idx, in_rank, per_expert.shape[0] // num_ranks)
        if weights is not None and weights.requires_grad:
            weights = weights.detach()
        return RoutingShare(in_rank, per_expert, topk_idx, weights)

    def check_slots(self, num_slots: int) -> None:
        """Raise `ShapeError` if this rank's tokens are more than each rank may have."""
        num_tokens = 0 if self.is_token_in_rank is None else self.is_token_in_rank.shape[0]
        if num_slots < max(num_tokens, 1):
            expected = f"at least {max(num_tokens, 1)}, the number of tokens"
            raise ShapeError("num_max_tokens_per_rank", got=num_slots, expected=expected)


@functools.lru_cache(_REMEMBERED)
def _check_dispatch(
    x: tuple[Meta, ...], tensors: tuple[Meta, ...], numbers: tuple[int, int, int]
) -> None:
    """Check what is known of the arguments of a dispatch, in their order; once for all alike.

    Raises:
        ShapeError, ConfigError: as `DispatchArguments.checked`.
    """
    in_rank, per_expert, topk_idx, weights = tensors
    alignment, num_worst_tokens, num_ranks = numbers
    format_of(x)
    num_tokens = 0 if x[0] is None else x[0][1][0]
    check_meta("is_token_in_rank", in_rank, dtype=torch.bool, shape=(num_tokens, num_ranks))
    check_meta("num_tokens_per_expert", per_expert, dtype=torch.int32, shape=(None,))
    num_local_experts(0 if per_expert is None else per_expert[1][0], num_ranks)
    for name, got, least in (
        ("expert_alignment", alignment, 1),
        ("num_worst_tokens", num_worst_tokens, 0),
    ):
        if got < least:
            raise ShapeError(name, got=got, expected=f"{least} or more")
    if topk_idx is None:
        if num_worst_tokens:
            raise ConfigError("num_worst_tokens needs topk_idx: padding rows are marked there")
        if weights is not None:
            raise ConfigError("topk_weights were given without topk_idx")
        return
    check_meta("topk_idx", topk_idx, dtype=torch.int64, shape=(num_tokens, None))
    if weights is not None:
        shape = (num_tokens, topk_idx[1][1])
        check_meta("topk_weights", weights, dtype=torch.float32, shape=shape)


def _check_presence(
    topk_idx: torch.Tensor, is_token_in_rank: torch.Tensor, experts_here: int
) -> None:
    """Compare the two ways of saying where tokens go. Looks at values: for debugging."""
    ranks = torch.arange(is_token_in_rank.shape[1], device=topk_idx.device)
    owner = topk_idx.clamp(min=0) // experts_here
    named = ((owner.unsqueeze(2) == ranks) & (topk_idx >= 0).unsqueeze(2)).any(1)
    differing = (named != is_token_in_rank).any(1).nonzero().flatten()
    if differing.numel():
        raise ConfigError(
            f"is_token_in_rank and topk_idx contradict each other, first in token "
            f"{int(differing[0])}"
        )


def checked_bias(
    x: torch.Tensor,
    handle: Handle,
    *,
    topk_weights: torch.Tensor | None,
    bias: torch.Tensor | Sequence[torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Check the arguments of a combine; returns the biases, none, one or two.

    Raises:
        ShapeError: a tensor has the wrong shape or dtype.
    """
    if x.dim() != 2 or x.dtype not in _COMBINED:
        got = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise ShapeError("x", got=got, expected="bfloat16, float16 or float32 [rows, hidden]")
    if topk_weights is not None:
        shape = (x.shape[0], None)
        check_tensor("topk_weights", topk_weights, dtype=torch.float32, shape=shape)
    terms = [] if bias is None else [bias] if isinstance(bias, torch.Tensor) else list(bias)
    for term in terms:
        check_tensor("bias", term, dtype=x.dtype, shape=(handle.num_tokens, x.shape[1]))
    return [term.detach() for term in terms]


def flat_rows(
    x: torch.Tensor, topk_weights: torch.Tensor | None, handle: Handle
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows to combine, one after another, and their weights: those of views lie in [R, M] slots.

    Raises:
        ShapeError: they do not lie as those of the dispatch.
    """
    slots = tuple(handle.recv_src_idx.shape)
    if len(slots) == 1:
        return x, topk_weights
    for name, rows in (("x", x), ("topk_weights", topk_weights)):
        if rows is not None and (rows.dim() != 3 or tuple(rows.shape[:2]) != slots):
            raise ShapeError(name, got=list(rows.shape), expected=f"[{slots[0]}, {slots[1]}, any]")
    return x.flatten(0, 1), None if topk_weights is None else topk_weights.flatten(0, 1)


def checked_wait_stats(
    name: str, stats: torch.Tensor | None, *, rank: int, num_ranks: int
) -> torch.Tensor | None:
    """Where the waits of this rank are counted: all of [R], or its row of [R, R].

    Raises:
        ShapeError: not int64, of another shape, or not contiguous.
    """
    if stats is None:
        return None
    shape = (num_ranks,) if stats.dim() == 1 else (num_ranks, num_ranks)
    check_tensor(name, stats, dtype=torch.int64, shape=shape)
    waits = stats if stats.dim() == 1 else stats[rank]
    if not waits.is_contiguous():
        raise ShapeError(name, got=f"strides {stats.stride()}", expected="contiguous")
    return waits


@dataclass(frozen=True, kw_only=True)
class BufferArguments:
    """The arguments of a buffer, as they came; the ranks must agree on all but the timeouts."""

    num_nvl_bytes: int
    num_rdma_bytes: int
    max_tokens_per_rank: int
    max_buffer_bytes: int
    transport: str | None
    low_latency_mode: bool
    enable_shrink: bool
    low_latency: LowLatencyOptions
    timeout_s: float | None
    first_call_timeout_s: float | None

    def agree(self, topology: Topology) -> None:
        """Raise unless all ranks can go on with the same arguments.

        Collective: all ranks, also those whose arguments are impossible. Sync: waits for them.

        Raises:
            RankMismatchError: the ranks were given different arguments.
            ConfigError: the arguments of this rank, or of another, are impossible.
        """
        error = self._error()
        told = topology.allgather((self._shared(), "" if error is None else str(error)))
        for name in self._shared():
            values = {rank: theirs[name] for rank, (theirs, _) in enumerate(told)}
            if len(set(values.values())) > 1:
                raise RankMismatchError(name, values, where="Buffer()")
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(told):
            if text:
                raise ConfigError(f"rank {rank} cannot make its buffer: {text}")

    @property
    def landing_bytes(self) -> int:
        """What low-latency calls start with. Other buffers reserve nothing for other hosts."""
        return self.num_rdma_bytes if self.low_latency_mode else 0

    def timeouts(self) -> Timeouts:
        """The deadlines: the arguments, or else the environment.

        Raises:
            ConfigError: not a number of seconds, or negative.
        """
        first = self.first_call_timeout_s
        found = Timeouts(
            first_call_s=_env.first_call_timeout_s() if first is None else first,
            steady_s=_env.timeout_s() if self.timeout_s is None else self.timeout_s,
        )
        if min(found.first_call_s, found.steady_s) < 0:
            raise ConfigError(f"timeouts must be 0 (for ever) or more seconds, got {found}")
        return found

    def _shared(self) -> dict[str, object]:
        name = self.transport if self.transport is not None else _env.transport()
        own = ("timeout_s", "first_call_timeout_s")
        shared = {field: value for field, value in vars(self).items() if field not in own}
        return {**shared, "transport": name}

    def _error(self) -> ConfigError | None:
        """What is wrong with this rank's arguments, if anything."""
        sizes = ("num_nvl_bytes", "num_rdma_bytes", "max_tokens_per_rank", "max_buffer_bytes")
        for name in sizes:
            if getattr(self, name) < 0:
                return ShapeError(name, got=getattr(self, name), expected="0 or more")
        start, most = self.num_nvl_bytes + self.landing_bytes, self.max_buffer_bytes
        if most and start > most:
            return ConfigError(f"a start of {start} bytes is more than max_buffer_bytes={most}")
        try:
            self.timeouts()
            self.low_latency.check()
        except ConfigError as error:
            return error
        return None
