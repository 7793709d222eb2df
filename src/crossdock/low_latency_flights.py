"""What low-latency calls on the host have in common: how rows depart, and what is remembered.

Whether they are laid out by expert (`low_latency`) or stay in the order of their tokens
(`low_latency_views`) is the matter of those who receive them.

T tokens here, K top-k, H hidden, R ranks, M slots for the tokens of a rank, S tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from crossdock import _env, layouts, ops
from crossdock.codec import encode, place_scales
from crossdock.errors import ConfigError, HandleError
from crossdock.formats import RowFormat
from crossdock.logfmt import decode_log
from crossdock.routing import Selection, SelectionTable
from crossdock.topology import Topology
from crossdock.transports.base import Landed, Landing, Routed, Shipment
from crossdock.transports.header import Header
from crossdock.transports.session import Attempt, Session
from crossdock.verbs import DispatchKind

__all__ = ["OF_VIEWS", "Departed", "Flights", "Memory", "Placed", "sum_up", "table_of"]

OF_VIEWS = 2
"""In the flags of a header: rows lie by source and token."""


@dataclass
class Memory:
    """What this rank remembers of a dispatch beyond its handle.

    Attributes:
        selection: choices, and weights if there were some, of this rank's tokens.
        in_rank: [T, R] bool, where they went.
        eras: how often each rank had been masked then.
        number: of the dispatch, the same on all ranks.
        table: every rank's choices with their weights, if dispatch was given weights.
        received: whether the rows have come.
        combine_buffer: where the caller writes the experts' outputs; None until asked for.
    """

    selection: Selection
    in_rank: torch.Tensor
    eras: tuple[int, ...]
    number: int
    table: SelectionTable | None
    received: bool = False
    combine_buffer: torch.Tensor | None = None


class Departed(NamedTuple):
    """A dispatch whose rows have been sent: what was learned, where tokens went, what will come."""

    routed: Routed
    table: SelectionTable
    in_rank: torch.Tensor
    landing: Landing


class Placed(NamedTuple):
    """Where rows come from and go: source rank, which of the rows it sent, and slot; each [P]."""

    sources: torch.Tensor
    arrivals: torch.Tensor
    slots: torch.Tensor


class Flights:
    """The low-latency calls of one buffer, as far as they do not ask how rows are laid out.

    Args:
        topology: the group.
        session: numbers the calls and takes them to the transport.
        partials: dtype of the sums that travel back: bfloat16 or float32.
    """

    def __init__(self, topology: Topology, session: Session, *, partials: torch.dtype) -> None:
        self._rank, self._num_ranks = topology.rank, topology.num_ranks
        self._session = session
        self._partials = partials
        self._memories = WeakTensorKeyDictionary()

    def _header(self, attempt: Attempt, row: RowFormat, selection: Selection) -> Header:
        num_tokens, num_topk = selection.topk_idx.shape
        return attempt.header(
            row,
            num_tokens=num_tokens,
            num_topk=num_topk,
            flags=int(selection.topk_weights is not None),
            share_bytes=selection.num_bytes,
            row_bytes=row.row_bytes,
        )

    def _present(self, selection: Selection, routed: Routed, num_experts: int) -> torch.Tensor:
        """[T, R] bool: whether a token goes to a rank, and comes back from it."""
        in_rank = selection.is_token_in_rank(num_experts, self._num_ranks)
        in_rank[:, sorted(routed.masked)] = False
        return in_rank

    def _coming(self, table: SelectionTable, num_experts: int) -> list[int]:
        """The rows that each rank sends here."""
        chosen = table.local(self._rank, num_experts // self._num_ranks) >= 0
        sources = table.src_rank[chosen.any(1)]
        coming: list[int] = torch.bincount(sources, minlength=self._num_ranks).tolist()
        return coming

    def _counts(self, sent: Sequence[int], coming: Sequence[int]) -> layouts.Counts:
        """The counts as far as this rank has to know them: what it sends, and what it gets."""
        counts = [[0] * self._num_ranks for _ in range(self._num_ranks)]
        if sent[self._rank] != coming[self._rank]:
            raise HandleError("the handle and the choices of its tokens contradict each other")
        for src, num in enumerate(coming):
            counts[src][self._rank] = num
        counts[self._rank] = list(sent)
        return counts

    def _depart(
        self, attempt: Attempt, x: torch.Tensor, selection: Selection, *, kind: DispatchKind
    ) -> Departed:
        """Send every token, encoded, to the ranks that own its experts."""
        row = kind.form.row(kind.hidden)
        planes = encode(x.detach().contiguous(), kind.form)
        header = self._header(attempt, row, selection)
        header = header._replace(
            num_slots=kind.num_slots,
            num_experts=kind.num_experts,
            flags=header.flags | OF_VIEWS * kind.viewed,
            return_bytes=row.hidden * self._partials.itemsize,
        )
        routed = attempt.route(header, selection.to_bytes())
        table = table_of(routed, selection)
        in_rank = self._present(selection, routed, kind.num_experts)
        counts = self._counts(in_rank.sum(0).tolist(), self._coming(table, kind.num_experts))
        sends = layouts.send_tokens(in_rank)
        landing = attempt.send(Shipment(planes, sends, counts, num_slots=kind.num_slots))
        return Departed(routed, table, in_rank, landing)

    def _place(
        self,
        landed: Landed,
        rows: Placed,
        payload: torch.Tensor,
        *,
        scales: torch.Tensor | None,
        slab_rows: int,
    ) -> None:
        """Copy what has landed to its slots."""
        flat = payload.view(-1, payload.shape[-1])
        for src in range(self._num_ranks):
            mine = (rows.sources == src).nonzero().squeeze(1)
            whence, where = rows.arrivals[mine], rows.slots[mine]
            ops.place_rows(landed.planes[0][src], whence, where, out=flat)
            if scales is not None:
                place_scales(landed.planes[1][src][whence], where, scales, slab_rows=slab_rows)

    def _known(self, key: torch.Tensor) -> Memory:
        """What is remembered of a dispatch, by a tensor that it returned."""
        memory: Memory | None = self._memories.get(key)
        if memory is None:
            raise HandleError("the handle is not one that this buffer returned")
        return memory

    def _recall(self, key: torch.Tensor, selection: Selection) -> Memory | None:
        """What is remembered of a dispatch, if a tensor that it returned is known, and fits."""
        memory: Memory | None = self._memories.get(key)
        if memory is None:
            return None
        if not memory.received:
            raise HandleError("the rows of this dispatch have not been received: run its hook")
        before = memory.selection
        if before.topk_idx.shape != selection.topk_idx.shape:
            shapes = f"{list(selection.topk_idx.shape)}, dispatch had {list(before.topk_idx.shape)}"
            raise HandleError(f"topk_idx of combine is {shapes}")
        if _env.debug() and not torch.equal(before.topk_idx, selection.topk_idx):
            raise ConfigError("topk_idx of combine is not that of dispatch")
        if memory.table is not None and not before.has_weights_of(selection):
            raise ConfigError("topk_weights of combine are not those that dispatch was given")
        return memory

    def _combine_buffer(
        self, key: torch.Tensor, shape: tuple[int, ...], *, make: bool
    ) -> torch.Tensor:
        memory = self._known(key)
        found = memory.combine_buffer
        if found is None or found.shape != shape:
            if not make:
                raise HandleError("zero_copy: nobody asked for this handle's combine buffer")
            found = torch.empty(shape, dtype=torch.bfloat16, device=key.device)
            memory.combine_buffer = found
        return found


def table_of(routed: Routed, mine: Selection) -> SelectionTable:
    """Every rank's choices, copied out of the transport's memory."""
    device = mine.topk_idx.device
    selections = [
        Selection.from_bytes(
            raw.to(device),
            num_tokens=header.num_tokens,
            num_topk=mine.topk_idx.shape[1],
            has_weights=mine.topk_weights is not None,
        )
        for header, raw in zip(routed.headers, routed.shares, strict=True)
    ]
    return SelectionTable.of(selections)


def sum_up(landed: Landed, in_rank: torch.Tensor, out: torch.Tensor, *, hidden: int) -> None:
    """Add up the sums of the ranks, in rank order; `hidden` where they are in logfmt."""
    in_rank[:, sorted(landed.masked)] = False
    planes = [torch.cat(pieces) for pieces in landed.planes]
    rows = decode_log(planes, hidden) if hidden else planes[0]
    plan = layouts.reduce_plan(layouts.send_head_of(in_rank), in_rank.sum(0).tolist())
    out.copy_(ops.reduce(rows, plan.row_splits, plan.slots))
