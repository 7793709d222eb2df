"""Low-latency dispatch and combine: the same path into expert slabs, in two halves.

    dispatch:   encode -> route -> send |  land -> place
    combine:    route -> gather-reduce -> send |  land -> reduce

A call sends at once and receives when it is told to, so that other work fits between. A row crosses
once per (token, rank), whatever the number of experts that want it there; on the way back a rank
adds up, weighted, what its experts have for a token. Every rank's rows land in places of their own,
so that the others can go on when one is missing. Arguments arrive as the public API checked them.

T tokens here, K top-k, H hidden, R ranks, L local experts, M slots for the tokens of a rank,
S tokens of all ranks, A compact rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from crossdock import _env, layouts, ops
from crossdock.codec import empty_scales, encode, place_scales
from crossdock.errors import ConfigError, HandleError
from crossdock.formats import RowFormat, TokenFormat
from crossdock.handle import LowLatencyHandle
from crossdock.layouts import ExpertRows
from crossdock.logfmt import decode_log, encode_log, log_row
from crossdock.routing import Selection, SelectionTable
from crossdock.topology import Topology, num_local_experts
from crossdock.transports.base import Landed, Routed, Shipment
from crossdock.transports.header import Header, Operation
from crossdock.transports.session import Attempt, Receive, Session
from crossdock.verbs import CombineKind, DispatchKind, Slabs, Stats

__all__ = ["LowLatency"]


@dataclass
class _Memory:
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


class _Placed(NamedTuple):
    """Where rows come from and go: source rank, which of the rows it sent, and slot; each [P]."""

    sources: torch.Tensor
    arrivals: torch.Tensor
    slots: torch.Tensor


class LowLatency:
    """The low-latency verbs of one buffer.

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

    def dispatch(
        self,
        x: torch.Tensor,
        selection: Selection,
        kind: DispatchKind,
        *,
        stats: Stats,
        hooked: bool,
    ) -> Slabs:
        """Send every token, encoded, to the ranks that own its experts; receive later.

        Args:
            x: [T, H] bf16.
            selection: their choices; with weights, combine needs not ask for them.
            kind: what the arguments say besides.
            stats: to be added to.
            hooked: receive later; otherwise `receive` has run.

        Collective: all ranks, in the same order as all other calls of the buffer.
        Sync: waits until all ranks have come to this call, not for their rows.
        Lifetime: the result is the caller's.

        Raises:
            HandleError: two dispatches are in flight already.
            Others: what `Transport.route` and `Transport.send` raise.
        """
        form, num_experts, selection = kind.form, kind.num_experts, selection.owned()
        row = form.row(kind.hidden)
        with self._session.flight(Operation.LOW_LATENCY_DISPATCH) as attempt:
            planes = encode(x.detach().contiguous(), form)
            header = self._header(attempt, row, selection)._replace(
                num_slots=kind.num_slots,
                num_experts=num_experts,
                return_bytes=row.hidden * self._partials.itemsize,
            )
            payload, scales, handle = self._empty_slabs(form, header, compact=kind.compact, like=x)
            routed = attempt.route(header, selection.to_bytes())
            table = _table(routed, selection)
            in_rank = self._present(selection, routed, num_experts)
            counts = self._counts(in_rank.sum(0).tolist(), self._coming(table, num_experts))
            sends = layouts.send_tokens(in_rank)
            landing = attempt.send(Shipment(planes, sends, counts, num_slots=kind.num_slots))
        known = None if selection.topk_weights is None else table
        memory = _Memory(selection, in_rank, routed.eras, attempt.call.sequence, known)
        self._memories[handle.src_info] = memory

        def receive() -> None:
            landed = landing.land(keep=True)
            rows = self._fill(handle, table.without(landed.masked))
            self._place(landed, rows, payload, scales=scales, slab_rows=handle.slab_rows)
            memory.received = True
            stats.add(landed.waited_after(routed), handle.packed_recv_count)

        done = self._session.receive(attempt.call, receive, hooked=hooked)
        return Slabs(payload, scales, handle, done)

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
        """Weight and sum the experts' rows of every token; receive later.

        Args:
            x: [L, R * M, H] bf16, or compact [n, H].
            selection: choices and weights of this rank's tokens, as dispatched.
            handle: of the dispatch.
            kind: what the arguments say besides.
            out: [T, H] of x's dtype, to be written by the receiving half.
            stats: as for `dispatch`.
            hooked: as for `dispatch`.

        Collective, Sync, Lifetime: as `dispatch`. `x` may be written again on return.

        Raises:
            HandleError: two combines are in flight already, or the handle is of other calls.
            ConfigError: the weights are not those that dispatch was given.
            Others: what `Transport.route` and `Transport.send` raise.
        """
        selection = selection.owned()
        with self._session.checking(Operation.LOW_LATENCY_COMBINE):
            memory = self._recall(handle, selection)
        known = None if memory is None else memory.table
        hidden, use_logfmt = handle.hidden, kind.use_logfmt
        row = log_row(hidden) if use_logfmt else RowFormat(self._partials, hidden)
        share = selection.to_bytes() if known is None else selection.topk_idx.new_empty(0).byte()
        with self._session.flight(Operation.LOW_LATENCY_COMBINE) as attempt:
            header = self._header(attempt, row, selection)._replace(
                num_slots=handle.num_max_dispatch_tokens_per_rank,
                num_experts=handle.num_experts,
                checksum=0 if memory is None else memory.number,
                flags=int(known is None),
                share_bytes=share.numel(),
            )
            routed = attempt.route(header, share)
            if memory is None or known is None:
                table = _table(routed, selection)
                in_rank = self._present(selection, routed, handle.num_experts)
            else:
                gone = routed.masked | routed.lost_since(memory.eras, self._rank)
                table, in_rank = known.without(gone), memory.in_rank.clone()
                in_rank[:, sorted(gone)] = False
            sums, num_back = self._partial_sums(x.detach(), handle, table)
            planes = encode_log(sums) if use_logfmt else [sums]
            counts = self._counts(num_back, in_rank.sum(0).tolist())
            sends = layouts.consecutive(num_back)
            landing = attempt.send(Shipment(planes, sends, counts, num_slots=handle.num_slots))

        def receive() -> None:
            landed = landing.land(keep=True)
            _sum_up(landed, in_rank, out, hidden=hidden if use_logfmt else 0)
            stats.add(landed.waited_after(routed))

        return self._session.receive(attempt.call, receive, hooked=hooked)

    def combine_buffer(self, handle: LowLatencyHandle, *, make: bool) -> torch.Tensor:
        """Where the experts' outputs may be written for a combine without a copy.

        Args:
            handle: of a dispatch.
            make: allocate it if nobody has asked for it yet.

        Returns:
            [L, R * M, H] bf16, the same for the same handle.

        Lifetime: as long as the handle's tensors.

        Raises:
            HandleError: the handle is not one of this buffer, or nobody asked and `make` is False.
        """
        memory = self._memories.get(handle.src_info)
        if memory is None:
            raise HandleError("the handle is not one that this buffer returned")
        if memory.combine_buffer is None:
            if not make:
                raise HandleError("zero_copy: nobody asked for this handle's combine buffer")
            rows = self._num_ranks * handle.num_slots
            shape = (handle.layout_range.shape[0], rows, handle.hidden)
            device = handle.src_info.device
            memory.combine_buffer = torch.empty(shape, dtype=torch.bfloat16, device=device)
        buffer: torch.Tensor = memory.combine_buffer
        return buffer

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

    def _empty_slabs(
        self, form: TokenFormat, header: Header, *, compact: bool, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, LowLatencyHandle]:
        """Room for payload, scales and handle on the device of `like`."""
        device = like.device
        experts_here = header.num_experts // self._num_ranks
        num_rows = self._num_ranks * header.num_slots
        compact_rows = num_rows * min(header.num_topk, experts_here)
        shape = (compact_rows,) if compact else (experts_here, num_rows)
        handle = LowLatencyHandle(
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.zeros((experts_here, self._num_ranks), dtype=torch.int64, device=device),
            header.num_slots,
            header.hidden,
            header.num_experts,
            torch.zeros(experts_here, dtype=torch.int32, device=device),
        )
        payload = torch.empty((*shape, header.hidden), dtype=form.element, device=device)
        return payload, empty_scales(form, header.hidden, shape=shape, device=device), handle

    def _fill(self, handle: LowLatencyHandle, table: SelectionTable) -> _Placed:
        """Lay out what has come, and fill the handle."""
        experts_here = handle.layout_range.shape[0]
        local = table.local(self._rank, experts_here)
        rows = layouts.expert_rows(local, table, experts_here)
        slots = rows.slots(handle.slab_rows)
        handle.src_info.view(-1)[slots] = rows.tokens.int()
        handle.layout_range.copy_(rows.layout_range)
        handle.packed_recv_count.copy_(rows.recv_count)
        arrivals = layouts.arrivals(local, table)[table.row_of(rows.sources, rows.tokens)]
        return _Placed(rows.sources, arrivals, slots)

    def _place(
        self,
        landed: Landed,
        rows: _Placed,
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

    def _recall(self, handle: LowLatencyHandle, selection: Selection) -> _Memory | None:
        """What is remembered of a dispatch, if its handle is known and fits."""
        memory: _Memory | None = self._memories.get(handle.src_info)
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

    def _partial_sums(
        self, x: torch.Tensor, handle: LowLatencyHandle, table: SelectionTable
    ) -> tuple[torch.Tensor, list[int]]:
        """The sums of this rank's rows, for all ranks, and how many each rank gets."""
        local = table.local(self._rank, num_local_experts(handle.num_experts, self._num_ranks))
        rows = ExpertRows.of_handle(handle.layout_range, handle.src_info, compact=handle.is_compact)
        slots = rows.slots(x.shape[1] if x.dim() == 3 else 0)
        plan = layouts.partial_sums(rows, slots, local, table=table)
        sums = ops.gather_reduce(
            x.reshape(-1, handle.hidden),
            plan.row_splits,
            plan.slots,
            weights=plan.weights,
            dtype=self._partials,
        )
        return sums, plan.num_back


def _table(routed: Routed, mine: Selection) -> SelectionTable:
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


def _sum_up(landed: Landed, in_rank: torch.Tensor, out: torch.Tensor, *, hidden: int) -> None:
    """Add up the sums of the ranks, in rank order; `hidden` where they are in logfmt."""
    in_rank[:, sorted(landed.masked)] = False
    planes = [torch.cat(pieces) for pieces in landed.planes]
    rows = decode_log(planes, hidden) if hidden else planes[0]
    plan = layouts.reduce_plan(layouts.send_head_of(in_rank), in_rank.sum(0).tolist())
    out.copy_(ops.reduce(rows, plan.row_splits, plan.slots))
