"""What a buffer asks of whoever makes its calls: the verbs, and what they bring.

Two make them: the host, which moves rows through a transport (`exchange`, `low_latency`), and
kernels that the host launches (`device`). A buffer does not know which.

T tokens here, K top-k, H hidden, R ranks, N received rows, L local experts,
M slots for the tokens of a rank, A compact rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol

import torch

from crossdock.codec import AnyTokens, Tokens
from crossdock.config import Config
from crossdock.formats import RowFormat, TokenFormat
from crossdock.handle import Handle, LowLatencyHandle
from crossdock.routing import DispatchLayout, RoutingShare, Selection
from crossdock.shapes import Meta
from crossdock.transports.session import Receive

__all__ = [
    "NO_STATS",
    "CombineKind",
    "Combined",
    "DispatchKind",
    "Dispatched",
    "ExchangeCalls",
    "LowLatencyCalls",
    "LowLatencyViews",
    "Slabs",
    "Stats",
    "Views",
]


@dataclass(frozen=True)
class Dispatched(Generic[AnyTokens]):
    """What a dispatch brings.

    Attributes:
        tokens: received rows [N, H], with their scales if they came with some.
        topk_idx: [N, K] int64 local expert ids, -1 where the slot is another rank's; or None.
        topk_weights: [N, K] float32, 0 where the slot is another rank's; or None.
        num_tokens_per_expert: rows per local expert; empty when rows were padded.
        handle: for combine and for cached dispatches.
    """

    tokens: AnyTokens
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_tokens_per_expert: list[int]
    handle: Handle


class Views(NamedTuple):
    """What a dispatch brings whose rows stay where they have landed. M slots for a rank's rows.

    Attributes:
        tokens: received rows [R, M, H] by source rank, with their scales [R, M, S] if they came
            with some; any strides, the last 1. Undefined where no row is.
        topk_idx: [R, M, K] int64 local expert ids, -1 where the slot is another rank's or no row
            is; or None.
        topk_weights: [R, M, K] float32, 0 where `topk_idx` is -1; or None.
        num_rows: [R] int32, rows of each rank, in the first slots.
        handle: for combine, whose rows lie alike; its `recv_src_idx` is [R, M].
    """

    tokens: Tokens
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_rows: torch.Tensor
    handle: Handle


class LowLatencyViews(NamedTuple):
    """What a low-latency dispatch brings whose rows stay where they have landed.

    M slots for a rank's tokens, each token in the slot of its index. The tensors are complete once
    the rows have been received.

    Attributes:
        tokens: rows [R, M, H] by source rank and token, with scales `(rows, scales)`: [R, M, number
            of scales], [R, M] where a row has one; any strides. Undefined where no row is.
        topk_idx: [R, M, K] int64 local expert ids, -1 where the slot is another rank's or no row
            is.
        topk_weights: [R, M, K] float32, undefined where `topk_idx` is -1; None if dispatch was
            given none.
        src_idx: [R, M] int32, for combine: the token where a row is, elsewhere -1.
        num_experts: E.
    """

    tokens: Tokens
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    src_idx: torch.Tensor
    num_experts: int


class Combined(NamedTuple):
    """What a combine brings: rows [T, H], and weights [T, K] float32 if there were some."""

    rows: torch.Tensor
    topk_weights: torch.Tensor | None


class Stats(NamedTuple):
    """The caller's statistics, to be added to; None where not wanted.

    Attributes:
        waits: [R] int64, microseconds that each rank was waited for.
        received: [L] int32, rows of each expert.
    """

    waits: torch.Tensor | None = None
    received: torch.Tensor | None = None

    def add(self, waited_us: Sequence[int], recv_count: torch.Tensor | None = None) -> None:
        """Add what one call brings."""
        if self.received is not None and recv_count is not None:
            self.received.add_(recv_count)
        if self.waits is not None:
            told = torch.tensor(list(waited_us), dtype=torch.int64, device=self.waits.device)
            self.waits.add_(told)


NO_STATS = Stats()
"""None is wanted, as in most calls."""


class ExchangeCalls(Protocol):
    """The high-throughput verbs of one buffer, whoever moves the rows. See `Exchange`."""

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """Count where this rank's tokens go."""
        ...

    def dispatch(
        self,
        x: AnyTokens,
        routing: RoutingShare,
        *,
        alignment: int,
        num_worst_tokens: int,
        config: Config,
        stats: Stats,
    ) -> Dispatched[AnyTokens]:
        """Send every token to the ranks that want it."""
        ...

    def dispatch_again(
        self, x: AnyTokens, handle: Handle, *, config: Config, stats: Stats
    ) -> AnyTokens:
        """Send other rows the way an earlier dispatch went."""
        ...

    def dispatch_views(
        self, x: AnyTokens, routing: RoutingShare, *, num_slots: int, config: Config, stats: Stats
    ) -> Views:
        """Send every token to the ranks that want it, and leave the rows where they land."""
        ...

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: Sequence[torch.Tensor] = (),
        config: Config,
        stats: Stats,
    ) -> Combined:
        """Bring one row per (token, rank) back and sum them."""
        ...

    def warmup(self, form: RowFormat, num_tokens: int) -> None:
        """Make room for calls of this size, and wait until all ranks are here."""
        ...

    def check(self) -> None:
        """Raise what went wrong since the last call, as far as the host can know."""
        ...


@dataclass(frozen=True, eq=False)
class DispatchKind:
    """What low-latency dispatches have in common that differ in what is in their tensors alone.

    Made once for all of them, checked, and equal to itself only: whoever makes the calls may keep
    by it what it works out once.

    Attributes:
        form: how rows are encoded.
        num_tokens, hidden, num_topk: T, H, K.
        num_slots: M, at least T, the same on all ranks.
        num_experts: E.
        compact: lay the experts' rows back to back instead of in slabs.
        x, topk_idx, topk_weights, waits, received: metas of the tensors, the last two of `Stats`.
        viewed: leave rows where they land.
    """

    form: TokenFormat
    num_tokens: int
    hidden: int
    num_topk: int
    num_slots: int
    num_experts: int
    compact: bool
    x: Meta
    topk_idx: Meta
    topk_weights: Meta
    waits: Meta
    received: Meta
    viewed: bool


@dataclass(frozen=True, eq=False)
class CombineKind:
    """What low-latency combines have in common. See `DispatchKind`.

    Attributes:
        num_tokens, hidden, num_topk: T, H, K.
        num_slots, num_experts, num_rows: of the dispatch M, E, and rows of all its slabs.
        compact, x_is_compact: whether dispatch laid rows back to back, and whether x is laid so.
        use_logfmt: send sums in ten bits a value.
        x, topk_idx, topk_weights, out, waits, src_info: metas of the tensors.
        viewed: whether x lies as the rows of views do, a row for each token.
        pulls: whether x lies where other ranks read it.
    """

    num_tokens: int
    hidden: int
    num_topk: int
    num_slots: int
    num_experts: int
    num_rows: int
    compact: bool
    x_is_compact: bool
    use_logfmt: bool
    x: Meta
    topk_idx: Meta
    topk_weights: Meta
    out: Meta
    waits: Meta
    src_info: Meta
    viewed: bool = False
    pulls: bool = False


class Slabs(NamedTuple):
    """What a low-latency dispatch brings. The tensors are complete once `receive` has run.

    Attributes:
        payload: [L, R * M, H], or compact [A, H].
        scales: [L, R * M, number of scales] or [A, number of scales], column-major; one
            dimension less where a row has one scale; None without scales.
        handle: for combine; its `packed_recv_count` [L] int32 says how many rows there are.
        receive: the receiving half; None if it has run.
    """

    payload: torch.Tensor
    scales: torch.Tensor | None
    handle: LowLatencyHandle
    receive: Receive | None


class LowLatencyCalls(Protocol):
    """The low-latency verbs of one buffer, whoever moves the rows. See `LowLatency`."""

    def dispatch(
        self,
        x: torch.Tensor,
        selection: Selection,
        kind: DispatchKind,
        *,
        stats: Stats,
        hooked: bool,
    ) -> Slabs:
        """Send every token, encoded, to the ranks that own its experts."""
        ...

    def combine(
        self,
        x: torch.Tensor,
        selection: Selection,
        handle: LowLatencyHandle,
        *,
        kind: CombineKind,
        out: torch.Tensor,
        stats: Stats,
        hooked: bool,
    ) -> Receive | None:
        """Weight and sum the experts' rows of every token."""
        ...

    def dispatch_views(
        self,
        x: torch.Tensor,
        selection: Selection,
        kind: DispatchKind,
        *,
        stats: Stats,
        hooked: bool,
    ) -> tuple[LowLatencyViews, Receive | None]:
        """Send every token, encoded, to the ranks that own its experts, and leave it there."""
        ...

    def combine_views(
        self,
        x: torch.Tensor,
        selection: Selection,
        views: LowLatencyViews,
        *,
        kind: CombineKind,
        out: torch.Tensor,
        stats: Stats,
        hooked: bool,
    ) -> Receive | None:
        """Sum what the ranks have for every token."""
        ...

    def views_buffer(self, views: LowLatencyViews, hidden: int, *, make: bool) -> torch.Tensor:
        """Where what goes back may be written for a combine of views without a copy."""
        ...

    def combine_buffer(self, handle: LowLatencyHandle, *, make: bool) -> torch.Tensor:
        """Where the experts' outputs may be written for a combine without a copy."""
        ...
