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

import torch

from crossdock import layouts, ops
from crossdock.codec import empty_scales
from crossdock.formats import RowFormat
from crossdock.handle import LowLatencyHandle
from crossdock.layouts import ExpertRows
from crossdock.logfmt import encode_log, log_row
from crossdock.low_latency_flights import Memory, Placed, sum_up, table_of
from crossdock.low_latency_views import ViewFlights
from crossdock.routing import Selection, SelectionTable
from crossdock.topology import num_local_experts
from crossdock.transports.base import Shipment
from crossdock.transports.header import Operation
from crossdock.transports.session import Receive
from crossdock.verbs import CombineKind, DispatchKind, Slabs, Stats

__all__ = ["LowLatency"]


class LowLatency(ViewFlights):
    """The low-latency verbs of one buffer. See `Flights`."""

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
        selection = selection.owned()
        with self._session.flight(Operation.LOW_LATENCY_DISPATCH) as attempt:
            payload, scales, handle = self._empty_slabs(kind, like=x)
            routed, table, in_rank, landing = self._depart(attempt, x, selection, kind=kind)
        known = None if selection.topk_weights is None else table
        memory = Memory(selection, in_rank, routed.eras, attempt.call.sequence, known)
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
            memory = self._recall(handle.src_info, selection)
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
                table = table_of(routed, selection)
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
            sum_up(landed, in_rank, out, hidden=hidden if use_logfmt else 0)
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
        rows = self._num_ranks * handle.num_slots
        shape = (handle.layout_range.shape[0], rows, handle.hidden)
        return self._combine_buffer(handle.src_info, shape, make=make)

    def _empty_slabs(
        self, kind: DispatchKind, *, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, LowLatencyHandle]:
        """Room for payload, scales and handle on the device of `like`."""
        device, form = like.device, kind.form
        experts_here = kind.num_experts // self._num_ranks
        num_rows = self._num_ranks * kind.num_slots
        compact_rows = num_rows * min(kind.num_topk, experts_here)
        shape = (compact_rows,) if kind.compact else (experts_here, num_rows)
        handle = LowLatencyHandle(
            torch.empty(shape, dtype=torch.int32, device=device),
            torch.zeros((experts_here, self._num_ranks), dtype=torch.int64, device=device),
            kind.num_slots,
            kind.hidden,
            kind.num_experts,
            torch.zeros(experts_here, dtype=torch.int32, device=device),
        )
        payload = torch.empty((*shape, kind.hidden), dtype=form.element, device=device)
        return payload, empty_scales(form, kind.hidden, shape=shape, device=device), handle

    def _fill(self, handle: LowLatencyHandle, table: SelectionTable) -> Placed:
        """Lay out what has come, and fill the handle."""
        experts_here = handle.layout_range.shape[0]
        local = table.local(self._rank, experts_here)
        rows = layouts.expert_rows(local, table, experts_here)
        slots = rows.slots(handle.slab_rows)
        handle.src_info.view(-1)[slots] = rows.tokens.int()
        handle.layout_range.copy_(rows.layout_range)
        handle.packed_recv_count.copy_(rows.recv_count)
        arrivals = layouts.arrivals(local, table)[table.row_of(rows.sources, rows.tokens)]
        return Placed(rows.sources, arrivals, slots)

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
