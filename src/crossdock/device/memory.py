"""How the heap of a device buffer is divided, and what kernels are told of it.

Everything is arithmetic on sizes that are equal on all ranks, so that offsets are, too, and the
ranks enlarge the heap together without a message. A heap holds words to watch, credits, two zones
for low-latency calls, of which one may be in flight while the other is used, and one for
high-throughput calls.

R ranks, M slots for the tokens of a rank, K top-k, L local experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from crossdock.config import align
from crossdock.errors import BufferTooSmallError, HandleError, TransportError
from crossdock.ops.triton.expert_records import Zone
from crossdock.ops.triton.expert_sums import ReturnZone
from crossdock.ops.triton.links import MASKED, REPORT
from crossdock.ops.triton.rank_records import BackZone, RowZone
from crossdock.transports.header import Call
from crossdock.transports.symmetric import AddressedHeap, Symmetric

__all__ = [
    "BACK_UNIT",
    "NUM_STATES",
    "UNIT",
    "DeviceCapacity",
    "Generation",
    "Memory",
    "Plan",
    "is_capturing",
]

NUM_STATES = 8
"""Rounds that are counted: dispatch and combine of two low-latency zones, and four more."""

UNIT, BACK_UNIT = 8, 4
"""Tokens that a flag covers in a high-throughput dispatch, and in a combine.

Who sends raises as many at once as suits it. What the last ones cover is placed, and added up, when
the link is idle again.
"""

NUM_WELCOME_WORDS = NUM_STATES + 3
"""What a rank that returns is told: rounds of all states, turns of zones, its how manyth return."""

_LINE = 128
_CANARY = 0xA5
"""What the bytes behind every piece of a heap hold, if they are watched."""

_WATCH_WORDS = 8


@dataclass(frozen=True, kw_only=True)
class DeviceCapacity:
    """What a heap has room for.

    Attributes:
        slots, row_bytes, back_bytes: of low-latency calls M, bytes of a landing row, and of one on
            its way back.
        num_tokens, token_bytes, sum_bytes: the same of high-throughput calls.
        choice_bytes: of what a token chose, as high-throughput calls send it.
        topk: K.
        experts: L.
    """

    slots: int = 0
    row_bytes: int = 0
    back_bytes: int = 0
    num_tokens: int = 0
    token_bytes: int = 0
    choice_bytes: int = 0
    sum_bytes: int = 0
    topk: int = 0
    experts: int = 0

    @functools.cached_property
    def num_flags(self) -> int:
        """Flags for the tokens of a rank in a high-throughput dispatch."""
        return -(-self.num_tokens // UNIT)

    @functools.cached_property
    def num_back_flags(self) -> int:
        """The same in a combine."""
        return self.num_flags * (UNIT // BACK_UNIT)

    def covering(self, other: DeviceCapacity) -> DeviceCapacity:
        """Room for both; this one itself where it is enough."""
        if self.covers(other):
            return self
        names = [field.name for field in fields(self)]
        larger = {name: max(getattr(self, name), getattr(other, name)) for name in names}
        return replace(self, **larger)

    def covers(self, other: DeviceCapacity) -> bool:
        """Whether what is enough for the other one is there."""
        return (
            self.slots >= other.slots
            and self.row_bytes >= other.row_bytes
            and self.back_bytes >= other.back_bytes
            and self.num_tokens >= other.num_tokens
            and self.token_bytes >= other.token_bytes
            and self.choice_bytes >= other.choice_bytes
            and self.sum_bytes >= other.sum_bytes
            and self.topk >= other.topk
            and self.experts >= other.experts
        )


class _Offsets:
    """Hands out room, one piece after another, with a line between that nobody writes to."""

    def __init__(self) -> None:
        self.end = 0
        self.guards: list[int] = []

    def take(self, nbytes: int) -> int:
        begin, guard = self.end, align(self.end + nbytes, _LINE)
        self.guards.append(guard)
        self.end = guard + _LINE
        return begin


@dataclass(frozen=True)
class Plan:
    """Where everything lies in a heap.

    Attributes:
        watch, credits: see `ops.triton.links.Link`.
        welcome: [R, words] int64, what each rank tells this one when it counts on it again.
        zones, returns: of the two sets of low-latency calls.
        rows, back: of high-throughput calls.
        guards: where the lines lie that nobody writes to, one behind every piece.
        nbytes: of the whole heap.
    """

    watch: int
    credits: int
    welcome: int
    zones: tuple[Zone, ...]
    returns: tuple[ReturnZone, ...]
    rows: RowZone
    back: BackZone
    guards: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, capacity: DeviceCapacity, num_ranks: int) -> Plan:
        """Divide a heap."""
        at = _Offsets()
        watch = at.take(8 * (_WATCH_WORDS + num_ranks))
        credit = at.take(2 * 4 * num_ranks * NUM_STATES)
        welcome = at.take(8 * NUM_WELCOME_WORDS * num_ranks)
        rows = num_ranks * capacity.slots
        zones, returns = [], []
        for _ in range(2):
            told, counts = at.take(16 * (num_ranks + 1)), at.take(8 * num_ranks * capacity.experts)
            flags, landing = at.take(4 * rows), at.take(rows * capacity.row_bytes)
            zones.append(Zone(landing=landing, flags=flags, counts=counts, told=told))
            flags, weights = at.take(4 * rows), at.take(8 * rows * capacity.topk)
            landing = at.take(rows * capacity.back_bytes)
            returns.append(ReturnZone(landing=landing, flags=flags, weights=weights))
        rows_zone, back_zone = cls._of_rows(capacity, num_ranks, at)
        return cls(
            watch,
            credit,
            welcome,
            tuple(zones),
            tuple(returns),
            rows_zone,
            back_zone,
            tuple(at.guards),
            at.end,
        )

    @classmethod
    def _of_rows(
        cls, capacity: DeviceCapacity, num_ranks: int, at: _Offsets
    ) -> tuple[RowZone, BackZone]:
        rows = num_ranks * capacity.num_tokens
        told = at.take(8 * num_ranks * (num_ranks + 2))
        counts = at.take(8 * num_ranks * capacity.experts)
        flags, heads = at.take(4 * num_ranks * capacity.num_flags), at.take(4 * rows)
        numbered, choices = at.take(2 * 4 * num_ranks), at.take(rows * capacity.choice_bytes)
        landing = at.take(rows * capacity.token_bytes)
        kept, back_flags = at.take(8 * num_ranks), at.take(4 * num_ranks * capacity.num_back_flags)
        back = BackZone(landing=at.take(rows * capacity.sum_bytes), flags=back_flags, kept=kept)
        return RowZone(landing, heads, choices, flags, numbered, told, counts), back


class Generation:
    """One heap of all ranks, from one growth to the next, and the words that go with it.

    Attributes:
        capacity, plan: how it is divided.
        peers: [R] int64, the address of every rank's heap.
        states: [NUM_STATES] int64, rounds and tickets.
        own: the heap of this rank, uint8.
        turns: low-latency dispatches and combines so far, whose zones take turns.
        read_at: of both zones of combines, after how many dispatches other ranks last read there.
        shown: `own` as other dtypes. See `operands.show`.
        masked: [R] int64, not 0 where this rank goes on without a rank; part of its heap.
        addresses: of peers and states.
    """

    def __init__(
        self,
        heap: AddressedHeap,
        capacity: DeviceCapacity,
        *,
        rank: int,
        device: torch.device,
        report: int,
        guarded: bool = False,
    ) -> None:
        self.capacity = capacity
        self.heap = heap
        self.plan = Plan.of(capacity, len(heap.addresses))
        self.peers = torch.tensor(heap.addresses, dtype=torch.int64, device=device)
        states = torch.zeros(NUM_STATES + 2, dtype=torch.int64, device=device)
        self.states = states[:NUM_STATES]
        self.addresses = (self.peers.data_ptr(), states.data_ptr())
        self.turns = [0, 0]
        self.read_at = [-1, -1]
        self._held: set[tuple[int, int]] = set()
        self.shown: dict[torch.dtype, torch.Tensor] = {}
        self.own = own = heap.peer(rank)
        words = own[self.plan.watch : self.plan.credits].view(torch.int64)
        words[REPORT.value] = report
        self.masked = words[MASKED.value : MASKED.value + len(heap.addresses)]
        self._guards = [own[begin : begin + _LINE] for begin in self.plan.guards if guarded]
        for guard in self._guards:
            guard.fill_(_CANARY)

    def check_guards(self) -> None:
        """Raise `TransportError` if something was written between the pieces of a guarded heap.

        Sync: waits for the device.
        """
        broken = [
            begin
            for begin, guard in zip(self.plan.guards, self._guards, strict=False)
            if not bool((guard == _CANARY).all())
        ]
        if broken:
            raise TransportError(f"something was written beyond its place, at offsets {broken}")

    def next_zone(self, kind: int) -> int:
        """Whose turn it is: 0 and 1, for dispatches (kind 0) and combines (kind 1).

        Raises:
            HandleError: the call before the last has not been received here.
        """
        zone = self.turns[kind] % len(self.plan.zones)
        if (kind, zone) in self._held:
            raise HandleError("the call before the last is in flight still: run its hook first")
        self.turns[kind] += 1
        return zone

    def hold_zone(self, kind: int, zone: int, receive: Callable[[], None]) -> Callable[[], None]:
        """The receiving half of a call, after which its zone may be taken again."""
        self._held.add((kind, zone))

        def run() -> None:
            receive()
            self._held.discard((kind, zone))

        return run

    def is_held(self, kind: int, zone: int) -> bool:
        """Whether the call that took a zone last has not been received."""
        return (kind, zone) in self._held

    @property
    def has_flights(self) -> bool:
        """Whether a call has not been received."""
        return bool(self._held)

    def skip_round(self, state: int) -> None:
        """Count a round of an operation as over that others have made in this heap, or skip too.

        Graphs that are a part of it then find all ranks in step.
        """
        self.states[state] += 1 << 32

    def welcome_of(self, rank: int) -> torch.Tensor:
        """What a rank is told when it returns: a row for each rank that tells, int64."""
        begin, num_ranks = self.plan.welcome, len(self.heap.addresses)
        end = begin + 8 * NUM_WELCOME_WORDS * num_ranks
        return self.heap.peer(rank)[begin:end].view(torch.int64).view(num_ranks, -1)


class Memory:
    """The heap of a buffer, enlarged when calls need it.

    Args:
        transport: what reserves it.
        guarded: whether what lies between the pieces of a heap is looked at.

    Attributes:
        num_ranks: R.
        current: the heap; None before the first call.
    """

    def __init__(self, transport: Symmetric, *, guarded: bool = False) -> None:
        self._transport, self._guarded = transport, guarded
        self._rank = transport.topology.rank
        self.num_ranks = transport.topology.num_ranks
        self._kept: list[Generation] = []
        self.current: Generation | None = None

    def covering(self, wanted: DeviceCapacity, report: int, call: Call) -> Generation:
        """A heap with room for a call; the same on all ranks, since the call is.

        Collective: when the heap is too small, all ranks. Sync: then waits for them all.

        Args:
            wanted: what the call needs.
            report: address that kernels report to.
            call: that needs it.

        Raises:
            PeerTimeoutError: it has to grow, and some ranks did not come.
            BufferTooSmallError: it would exceed the limit, or a graph is being captured.
        """
        current = self.current
        if current is not None and current.capacity.covers(wanted):
            return current
        have = DeviceCapacity() if current is None else current.capacity
        needed = have.covering(wanted)
        nbytes = Plan.of(needed, self.num_ranks).nbytes
        limit, masks = self._transport.max_bytes, self._transport.masks
        if is_capturing():
            raise self._too_small(nbytes, current, "max_tokens_per_rank, or a call before capture")
        if masks is not None and masks.masked():
            raise self._too_small(nbytes, current, "max_tokens_per_rank, or fewer masks")
        if limit and nbytes > limit:
            raise BufferTooSmallError(nbytes, limit, argument="max_buffer_bytes", rank=self._rank)
        heap = self._transport.reserve(nbytes, call)
        return self._replace(heap, needed, report)

    def _too_small(
        self, nbytes: int, current: Generation | None, argument: str
    ) -> BufferTooSmallError:
        have = 0 if current is None else current.plan.nbytes
        return BufferTooSmallError(nbytes, have, argument=argument, rank=self._rank)

    def local(self) -> torch.Tensor | None:
        """Where high-throughput rows land on this rank, as uint8."""
        if self.current is None:
            return None
        plan = self.current.plan
        begin = plan.rows.landing
        end = min(guard for guard in plan.guards if guard >= begin)
        return self.current.own[begin:end]

    def _replace(self, heap: AddressedHeap, capacity: DeviceCapacity, report: int) -> Generation:
        device = self._transport.device
        self.current = Generation(
            heap,
            capacity,
            rank=self._rank,
            device=device,
            report=report,
            guarded=self._guarded,
        )
        return self.current

    def clear(self) -> None:
        """Give all heaps up, after what runs on the device is over."""
        if self.current is not None and self._transport.device.type == "cuda":
            torch.cuda.synchronize()
        self.current = None
        self._kept.clear()

    def keep(self) -> None:
        """The current heap is part of a graph: it stays as long as the buffer."""
        if self.current is not None and self.current not in self._kept:
            self._kept.append(self.current)


def is_capturing() -> bool:
    """Whether the current stream is recording a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
