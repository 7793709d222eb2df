"""All ranks in one process, a thread each: for tests, docs and teaching.

The whole transport is a board on which ranks pin what they have for the others. It is the shortest
complete transport, so it is the one to read first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch

from crossdock import ops
from crossdock.errors import PeerTimeoutError, TransportError
from crossdock.topology import Communicator, Topology
from crossdock.transports.base import Deadline, Landed, Masks, Routed, Shipment
from crossdock.transports.header import Call, Header, check_agreement

__all__ = ["Loopback", "LoopbackComm", "run_threads"]

_Result = TypeVar("_Result")
_POLL_S = 0.05


Topic = tuple[str, int]
"""What is pinned, and in which call."""


class _Pin(NamedTuple):
    """A value, and when it was pinned."""

    value: Any
    at_s: float


class Board:
    """Where ranks pin things for one another, by topic and call."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.last: dict[int, Header] = {}
        self.failures: dict[int, BaseException] = {}
        self._pinned: dict[Topic, dict[int, _Pin]] = {}
        self._done: dict[Topic, set[int]] = {}
        self._changed = threading.Condition()

    def pin(self, topic: Topic, rank: int, value: Any) -> None:
        """Show a value to all ranks."""
        with self._changed:
            self._pinned.setdefault(topic, {})[rank] = _Pin(value, time.monotonic())
            self._changed.notify_all()

    def take_down(self, topic: Topic, rank: int) -> None:
        """A rank needs the topic no more; it is forgotten when no rank does."""
        with self._changed:
            done = self._done.setdefault(topic, set())
            done.add(rank)
            if len(done) == self.num_ranks:
                del self._pinned[topic], self._done[topic]

    def give_up(self, rank: int, error: BaseException) -> None:
        """Wake all waiting ranks with an error."""
        with self._changed:
            self.failures[rank] = error
            self._changed.notify_all()

    def collect(self, topic: Topic, deadline: Deadline) -> tuple[list[_Pin], list[int]]:
        """Wait for all ranks' values; returns them, or the ranks that are missing at the end."""
        with self._changed:
            while True:
                pinned = self._pinned.get(topic, {})
                missing = [rank for rank in range(self.num_ranks) if rank not in pinned]
                if not missing:
                    return [pinned[rank] for rank in range(self.num_ranks)], []
                if deadline.passed or self.failures:
                    return [], missing
                self._changed.wait(_POLL_S)


class LoopbackComm:
    """An mpi4py-like communicator between threads; objects are passed by reference."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board, self._rank, self._number = board, rank, 0

    def Get_rank(self) -> int:  # noqa: N802 - mpi4py's name
        """This rank."""
        return self._rank

    def Get_size(self) -> int:  # noqa: N802 - mpi4py's name
        """Ranks of the group."""
        return self._board.num_ranks

    def allgather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Collective; waits for all."""
        self._number += 1
        topic = ("allgather", self._number)
        self._board.pin(topic, self._rank, value)
        values, missing = self._board.collect(topic, Deadline(0))
        if missing:
            raise TransportError(f"ranks failed: {self._board.failures}")
        self._board.take_down(topic, self._rank)
        return [pin.value for pin in values]


def run_threads(num_ranks: int, fn: Callable[[Communicator], _Result]) -> list[_Result]:
    """Run `fn(comm)` once per rank, each in a thread of its own.

    Returns:
        The results in rank order. The first error of a rank is raised, after all have ended.

    Example: `run_threads(2, lambda comm: comm.allgather(comm.Get_rank()))` -> [[0, 1], [0, 1]]
    """
    board = Board(num_ranks)

    def run(rank: int) -> _Result:
        try:
            return fn(LoopbackComm(board, rank))
        except BaseException as error:
            board.give_up(rank, error)
            raise

    with ThreadPoolExecutor(num_ranks) as threads:
        futures = [threads.submit(run, rank) for rank in range(num_ranks)]
    return [future.result() for future in futures]


class _Landing(NamedTuple):
    """Rows that are pinned, or will be."""

    transport: Loopback
    call: Call
    shipment: Shipment

    def land(self, *, keep: bool) -> Landed:
        """See `Landing.land`. The result is always the caller's own."""
        return self.transport.land(self.call, self.shipment)


class Loopback:
    """A transport between the threads of one process.

    Args:
        topology: of a group whose `allgather` passes references, as `LoopbackComm` does.
    """

    name = "loopback"
    device_types: tuple[str, ...] = ()
    masks: Masks | None = None
    stream: torch.cuda.Stream | None = None

    def __init__(self, topology: Topology) -> None:
        self._rank, self._num_ranks = topology.rank, topology.num_ranks
        board = Board(self._num_ranks) if self._rank == 0 else None
        self._board: Board = topology.allgather(board)[0]

    def route(self, call: Call, header: Header, share: torch.Tensor) -> Routed:
        """See `Transport.route`."""
        self._wait_for_all_to_enter_the_call_before(call)
        self._board.last[self._rank] = header
        begin_s = time.monotonic()
        pins = self._exchange("route", call, (header, share.clone(), ""))
        told = [pin.value for pin in pins]
        headers = [item[0] for item in told]
        check_agreement(headers, call, reason_of=lambda rank: str(told[rank][2]))
        return Routed(headers, [item[1] for item in told], _waits(pins, begin_s))

    def send(self, call: Call, shipment: Shipment) -> _Landing:
        """See `Transport.send`."""
        parcels = [
            [_copy_rows(plane, tokens, count) for plane in shipment.planes]
            for tokens, count in zip(shipment.sends, shipment.counts[self._rank], strict=True)
        ]
        self._board.pin(("land", call.sequence), self._rank, parcels)
        return _Landing(self, call, shipment)

    def land(self, call: Call, shipment: Shipment) -> Landed:
        """Wait for the rows of a call, and take them off the board."""
        begin_s = time.monotonic()
        pins = self._collect("land", call)
        self._board.take_down(("land", call.sequence), self._rank)
        mine = [pin.value[self._rank] for pin in pins]
        planes = [[of_rank[index] for of_rank in mine] for index in range(len(shipment.planes))]
        if not shipment.num_slots:
            planes = [[torch.cat(pieces)] for pieces in planes]
        return Landed(planes, _waits(pins, begin_s))

    def refuse(self, call: Call, header: Header, reason: str) -> None:
        """See `Transport.refuse`."""
        self._wait_for_all_to_enter_the_call_before(call)
        self._board.last[self._rank] = header
        refusal = (header._replace(refused=1), torch.empty(0, dtype=torch.uint8, device="cpu"))
        self._board.pin(("route", call.sequence), self._rank, (*refusal, reason))

    def fail(self, call: Call, error: BaseException) -> None:
        """See `Transport.fail`."""
        self._board.give_up(self._rank, error)

    def memory(self) -> Mapping[str, int]:
        """See `Transport.memory`: nothing is held between calls."""
        return {}

    def local_memory(self) -> torch.Tensor | None:
        """See `Transport.local_memory`."""
        return None

    def close(self) -> None:
        """See `Transport.close`."""

    def _wait_for_all_to_enter_the_call_before(self, call: Call) -> None:
        """A refusal runs ahead; what is pinned must stay until everybody has read it."""
        if call.sequence > 1:
            self._collect("route", call._replace(sequence=call.sequence - 1))
            self._board.take_down(("route", call.sequence - 1), self._rank)

    def _exchange(self, phase: str, call: Call, value: Any) -> list[_Pin]:
        """Pin this rank's value and collect all ranks' for this phase of the call."""
        self._board.pin((phase, call.sequence), self._rank, value)
        return self._collect(phase, call)

    def _collect(self, phase: str, call: Call) -> list[_Pin]:
        deadline = Deadline(call.timeout_s)
        values, missing = self._board.collect((phase, call.sequence), deadline)
        if not missing:
            return values
        for rank, error in self._board.failures.items():
            told = error.missing if isinstance(error, PeerTimeoutError) else []
            if not told or self._rank in told:
                text = f"{type(error).__name__}: {error}"
                raise TransportError(f"rank {rank} gave up while this rank was in {call}: {text}")
            raise self._timeout(
                told, call, phase, deadline=deadline, note=f"Reported by rank {rank}."
            )
        raise self._timeout(missing, call, phase, deadline=deadline)

    def _timeout(
        self, missing: list[int], call: Call, phase: str, *, deadline: Deadline, note: str = ""
    ) -> PeerTimeoutError:
        others = (rank for rank in range(self._num_ranks) if rank != self._rank)
        return PeerTimeoutError(
            missing,
            operation=str(call.operation),
            epoch=call.sequence,
            phase=phase,
            waited_s=deadline.waited_s,
            peers={rank: str(self._board.last.get(rank, Header())) for rank in others},
            note=note,
        )


def _copy_rows(plane: torch.Tensor, tokens: torch.Tensor | slice, count: int) -> torch.Tensor:
    rows = torch.empty((count, plane.shape[1]), dtype=plane.dtype, device=plane.device)
    ops.send(plane, tokens, rows)
    return rows


def _waits(pins: Sequence[_Pin], begin_s: float) -> list[int]:
    """For how many microseconds of a wait each rank's value was not there."""
    return [max(int((pin.at_s - begin_s) * 1e6), 0) for pin in pins]
