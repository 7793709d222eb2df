"""The transport whose rows the GPUs move themselves.

Kernels write to the memory of other ranks and wait for their signals, so the host neither routes
nor waits: instead of `route` and `send` this transport gives a heap that kernels can address, and
keeps the words by which they tell the host how they fare. The kernels are in `ops.triton`, what
they are launched with in `device`.

Without a GPU the same kernels run in Triton's interpreter, over shared memory between processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Protocol

import torch

from crossdock import _env
from crossdock.errors import PeerTimeoutError, StoreLostError, TransportError
from crossdock.topology import Topology
from crossdock.transports.base import Deadline, Masks
from crossdock.transports.control import Backoff
from crossdock.transports.header import Call, Header
from crossdock.transports.heap_cuda import CudaHeap, check_peer_access, this_gpu
from crossdock.transports.heap_shm import Address, Segment, ShmHeap
from crossdock.transports.notes import Notes

__all__ = ["GAVE_UP", "AddressedHeap", "Symmetric"]

GAVE_UP = 2
"""Plus a rank: what the first word of a heap holds when that rank gave up."""


class AddressedHeap(Protocol):
    """Memory of every rank, with the addresses by which kernels of this rank reach it."""

    nbytes: int
    addresses: list[int]

    def peer(self, rank: int) -> torch.Tensor:
        """The memory of `rank` as uint8 [nbytes]."""
        ...


class HeldMemory(Protocol):
    """What holds heaps until the transport is closed."""

    def local(self) -> torch.Tensor | None:
        """Memory of this rank that rows land in, as uint8."""
        ...

    def clear(self) -> None:
        """Let go of it."""
        ...


class _InterpretedHeap:
    """Shared memory of processes for kernels in the interpreter. See `AddressedHeap`."""

    def __init__(self, topology: Topology, nbytes: int) -> None:
        segment = Segment(nbytes)
        addresses = [Address(*told) for told in topology.allgather(tuple(segment.address))]
        self._heap = ShmHeap(segment, addresses)
        self.nbytes = nbytes
        ranks = range(topology.num_ranks)
        self.addresses = [self._heap.peer(rank).data_ptr() for rank in ranks]
        topology.allgather(None)
        segment.close()

    def peer(self, rank: int) -> torch.Tensor:
        """The memory of `rank` as uint8 [nbytes]."""
        return self._heap.peer(rank)


class Symmetric:
    """Memory that kernels of all ranks address.

    Args:
        topology: the group.
        max_bytes: limit of the memory of one rank; 0 for none.
        can_shrink: whether calls go on without a rank that is late.

    Collective: making one. Sync: waits for all ranks.

    Raises:
        TransportError: some GPUs cannot reach each other; on every rank.
    """

    name = "device"

    def __init__(self, topology: Topology, *, max_bytes: int = 0, can_shrink: bool = False) -> None:
        self.topology = topology
        self.max_bytes = max_bytes
        self.can_shrink = can_shrink
        self.is_interpreted = _env.interprets_kernels()
        self.device_types: tuple[str, ...] = ("cpu",) if self.is_interpreted else ("cuda",)
        self.masks: Masks | None = None
        self.stream: torch.cuda.Stream | None = None
        self.heap: AddressedHeap | None = None
        self._held: HeldMemory | None = None
        self._notes = Notes.of(topology)
        self._num_heaps = 0
        self._has_told = False
        if not self.is_interpreted:
            self._check_gpus()
            self.stream = torch.cuda.Stream(self.device)

    def _check_gpus(self) -> None:
        if not torch.cuda.is_available():
            told = ["there is no GPU"] * self.topology.num_ranks
        else:
            gpus = self.topology.allgather(this_gpu())
            told = self.topology.allgather(check_peer_access(gpus))
        problems = {rank: text for rank, text in enumerate(told) if text}
        if problems:
            raise TransportError("; ".join(f"rank {r}: {text}" for r, text in problems.items()))

    @property
    def device(self) -> torch.device:
        """Where the kernels run."""
        if self.is_interpreted:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def reserve(self, nbytes: int, call: Call) -> AddressedHeap:
        """A new heap of so many bytes, zeroed on all ranks, in place of the one before.

        Args:
            nbytes: of each rank.
            call: that needs it.

        Collective: all ranks. Sync: waits for all ranks, and for the device.

        Raises:
            PeerTimeoutError: some ranks did not come to the call before its deadline.
            TransportError: a rank gave up.
        """
        self._muster(call)
        made = CudaHeap if not self.is_interpreted else _InterpretedHeap
        heap: AddressedHeap = made(self.topology, nbytes)
        self.topology.allgather(None)
        self.heap = heap
        return heap

    def _muster(self, call: Call) -> None:
        """Wait until all ranks have come to a call: what follows cannot end without them."""
        if self._notes is None:
            return
        # Counted by themselves: a rank that was masked has missed calls, but no growth.
        self._num_heaps += 1
        number = self._num_heaps
        header = Header(operation=call.operation, sequence=call.sequence)
        self._notes.enter(call._replace(sequence=number), header)
        deadline, backoff = Deadline(call.timeout_s), Backoff()
        while True:
            for rank, text, _ in self._notes.failures():
                raise TransportError(f"rank {rank} gave up: {text}")
            entered = self._notes.entered()
            late = [rank for rank, (nth, _) in entered.items() if nth < number]
            if not late:
                return
            if deadline.passed:
                raise PeerTimeoutError(
                    late,
                    operation=str(call.operation),
                    epoch=call.sequence,
                    phase="grow",
                    waited_s=deadline.waited_s,
                    peers={rank: text for rank, (_, text) in entered.items()},
                )
            backoff.pause()

    def refuse(self, call: Call, header: Header, reason: str) -> None:
        """See `Carrier.refuse`."""
        self.fail(call, TransportError(reason))

    def fail(self, call: Call, error: BaseException) -> None:
        """See `Carrier.fail`. Kernels of the peers that wait end at once."""
        if self._notes is not None and not self._has_told:
            self._has_told = True
            with contextlib.suppress(StoreLostError):
                self._notes.give_up(str(error), getattr(error, "missing", []))
        if self.heap is None:
            return
        stream = None if self.is_interpreted else torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            if self.heap.peer(self.topology.rank)[:8].view(torch.int64).item():
                return  # the peers find out as this rank has
            for rank in range(self.topology.num_ranks):
                failed = self.heap.peer(rank)[:8].view(torch.int64)
                failed.fill_(GAVE_UP + self.topology.rank)

    def reason_of(self, rank: int) -> str:
        """Why a rank gave up, as far as it told."""
        if self._notes is None:
            return "it did not say why"
        with contextlib.suppress(StoreLostError):
            for other, text, _ in self._notes.failures():
                if other == rank:
                    return text
        return "it did not say why"

    def at_close(self, held: HeldMemory) -> None:
        """Have something that holds heaps let go of them when this is closed."""
        self._held = held

    def memory(self) -> Mapping[str, int]:
        """See `Carrier.memory`."""
        return {"heap": self.heap.nbytes if self.heap is not None else 0}

    def local_memory(self) -> torch.Tensor | None:
        """See `Carrier.local_memory`."""
        local = None if self._held is None else self._held.local()
        return torch.empty(0, dtype=torch.uint8, device=self.device) if local is None else local

    def close(self) -> None:
        """See `Carrier.close`."""
        if self._held is not None:
            self._held.clear()
        self.heap = None
