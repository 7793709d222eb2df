"""One high-throughput dispatch on its way: what each of its kernels is launched with.

Rows are sent by one kernel, beside which two others count and place them. Which of them a verb
needs, and where rows are placed, is `exchange`'s matter.

T tokens here, K top-k, R ranks, M slots for the rows of a rank, N received rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from crossdock.codec import Tokens
from crossdock.config import Config, align
from crossdock.device.addresses import addresses_received, addresses_sent
from crossdock.device.constants import aligned
from crossdock.device.engine import Engine
from crossdock.device.memory import UNIT, DeviceCapacity
from crossdock.device.operands import show
from crossdock.device.rank_kernels import (
    DispatchPlan,
    fingerprint,
    shares,
)
from crossdock.device.watch import HostWords, State
from crossdock.errors import BufferTooSmallError, UnsupportedError
from crossdock.handle import Handle
from crossdock.ops.triton import rank_records, rank_routes
from crossdock.routing import RoutingShare
from crossdock.transports.header import Call

__all__ = ["Trip"]


class Trip:
    """A dispatch on its way. What its kernels read lives as long as this.

    Args:
        engine: launches kernels.
        call: its number.
        plan: its kernels.
        x: rows to send.
        routing: where to.
        again: the handle of the dispatch that it repeats; None for a first one.
        waits: [R] int64, where waits are added, if they are counted.
        config: how many programs may run at a time, and how many of them send.

    Attributes:
        num_tokens: T.
        memory: the heap.

    Raises:
        UnsupportedError: `x` is on another device.
        BufferTooSmallError: there is no room for such rows.
    """

    def __init__(
        self,
        engine: Engine,
        call: Call,
        plan: DispatchPlan,
        *,
        x: Tokens,
        routing: RoutingShare,
        again: Handle | None = None,
        waits: torch.Tensor | None = None,
        config: Config,
    ) -> None:
        planes = [aligned(part) for part in (x if isinstance(x, tuple) else (x,))]
        if planes[0].device.type not in engine.device_types:
            raise UnsupportedError(
                f"the device transport moves {engine.device_types} tensors, "
                f"x is on {planes[0].device}"
            )
        self._engine, self._call, self._plan = engine, call, plan
        self._shares = shares(config.num_sms, senders=config.num_send_sms, viewed=plan.row.viewed)
        self._waits = waits
        self._in_rank = routing.is_token_in_rank.contiguous()
        self.num_tokens = planes[0].shape[0]
        self.memory = engine.memory(plan.capacity)
        if again is None:
            self._head = torch.empty(
                self._in_rank.shape, dtype=torch.int32, device=self._in_rank.device
            )
            self._num_sent = self._head.new_empty((engine.num_ranks, 1))
            self._prefix = self._head.new_empty((engine.num_ranks, engine.num_ranks))
            self._chunks = self._empty_chunks()
        else:
            self._prefix, self._num_sent, self._chunks, _, _, self._head = again
        idx, weights = _contiguous(routing.topk_idx), _contiguous(routing.topk_weights)
        numbered = (self._head, self._num_sent)
        self._sent = addresses_sent(planes, self._in_rank, numbered, idx=idx, weights=weights)
        self._planes, self._choices = planes, (idx, weights)

    @property
    def has_room(self) -> bool:
        """Whether the heap has room for the tokens of this rank."""
        return self.num_tokens <= self.memory.capacity.num_tokens

    def route(self, per_expert: torch.Tensor, *, alignment: int = 1, is_read: bool) -> HostWords:
        """Count this rank's rows and learn the others' counts; the host may look at the result."""
        engine, plan = self._engine, self._plan
        told = engine.host_words(3 + engine.num_ranks + plan.row.local, is_read=is_read)
        per_expert, of_handle = per_expert.contiguous(), (self._prefix, self._prefix, self._chunks)
        arguments = (
            self._sent,
            addresses_received([], of_handle, waits=self._waits),
            rank_routes.Learned(per_expert.data_ptr(), told.address, alignment),
            engine.link(self.memory, self._call, State.ROUTE),
            self.memory.plan.rows,
            self._sent_call(0, number=fingerprint(plan.row, alignment)),
        )
        plan.route.launch(plan.num_timers + 2, arguments)
        return told

    def send(self) -> None:
        """Send this rank's rows, beside what is launched next."""
        engine, plan = self._engine, self._plan
        programs = max(min(self._shares.senders, -(-self.num_tokens // plan.row.chunk)), 1)
        arguments = (
            self._sent,
            engine.link(self.memory, self._call, State.SEND),
            self.memory.plan.rows,
            self._sent_call(programs),
        )
        stream = engine.beside.begin()
        plan.send.launch(engine.num_ranks + programs, arguments, stream=stream)

    def place(
        self,
        rows: Sequence[torch.Tensor],
        shape: tuple[int, ...],
        *,
        idx: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Place the rows that come and their choices; views are not moved.

        Args:
            rows: payload [N, ...], and scales if there are some; none for views.
            shape: [N]; [R, M] for views, and so the others.
            idx: [N, K] int64.
            weights: [N, K] float32.

        Returns:
            Index of each row among its source's tokens: int32 of this shape.
        """
        programs, src_idx = self._shares.others, self._head.new_empty(shape)
        of_handle = (src_idx, self._prefix, self._chunks)
        arguments = (
            self._sent,
            addresses_received(rows, of_handle, idx=idx, weights=weights, waits=self._waits),
            self._engine.link(self.memory, self._call, State.PLACE),
            self.memory.plan.rows,
            self._sent_call(programs, num_rows=math.prod(shape)),
        )
        self._plan.place.launch(self._plan.num_timers + programs, arguments)
        return src_idx

    def handle(self, src_idx: torch.Tensor) -> Handle:
        """The handle of this dispatch, with what it received."""
        return Handle(
            self._prefix, self._num_sent, self._chunks, src_idx, self._in_rank, self._head
        )

    def views(self, num_slots: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The rows where they lie, [R, M, ...], and how many there are of each rank, [R] int32."""
        row, memory, landing = self._plan.row, self.memory, self.memory.plan.rows.landing
        planes = [
            show(
                memory,
                plane.dtype,
                (self._engine.num_ranks, num_slots, plane.shape[1]),
                at=landing + at,
                row=row.stride,
                slots=memory.capacity.num_tokens,
            )
            for plane, at in zip(self._planes, (0, row.scales_at), strict=False)
        ]
        return planes, self._chunks[0, :, 0]

    def enlarge(self, most: int) -> None:
        """Move on to a heap with room for this many tokens of a rank, and for some more.

        What was sent to the one before nobody places.

        Collective: all ranks. Sync: waits for them.
        """
        have = self.memory.capacity.num_tokens
        self.memory.skip_round(State.PLACE)
        if not self.has_room:
            self.memory.skip_round(State.SEND)
        roomy = align(most * 5 // 4 if have else most, UNIT)
        self.memory = self._engine.memory(DeviceCapacity(num_tokens=roomy))
        learned = self._chunks[0]
        self._chunks = self._empty_chunks()
        self._chunks[0].copy_(learned)

    def too_many(self) -> BufferTooSmallError:
        """The error that says that this rank's tokens are too many."""
        have = self.memory.capacity
        needed = have.covering(DeviceCapacity(num_tokens=self.num_tokens))
        return BufferTooSmallError(
            self._engine.num_bytes(needed),
            self.memory.plan.nbytes,
            argument="max_tokens_per_rank",
            rank=self._engine.rank,
        )

    def _empty_chunks(self) -> torch.Tensor:
        """Room for `Received.chunks`."""
        shape = (1 + self.memory.capacity.num_back_flags, self._engine.num_ranks, 2)
        return self._head.new_empty(shape)

    def _sent_call(
        self, programs: int, *, num_rows: int = 0, number: int = 0
    ) -> rank_records.SentCall:
        have = self.memory.capacity
        return rank_records.SentCall(
            self.num_tokens, have.num_tokens, have.num_flags, programs, num_rows, number
        )


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
