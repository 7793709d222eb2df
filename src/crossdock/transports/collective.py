"""Rows moved with `torch.distributed`: any device, any backend, any number of hosts.

Shares travel by all-gather, rows by `all_to_all_single` with splits that every rank knows. Each
rank notes in the group's store where it stands, and a rank that gives up says so there. Waits are
cut into slices, and between them a rank looks whether anybody is in trouble: then it answers that
it is alive, so that whoever does not answer is known. A process group whose collective was
abandoned cannot be used again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from crossdock import ops
from crossdock.errors import PeerTimeoutError, StoreLostError, TransportError
from crossdock.topology import Topology
from crossdock.transports.base import Deadline, Landed, Masks, Routed, Shipment
from crossdock.transports.header import Call, Header, check_agreement
from crossdock.transports.notes import UNUSABLE_GROUP, Notes

__all__ = ["Collective"]

_SLICE_S = 0.1
_SHORTEST_S = 0.001
_GRACE_S = 0.6
_POLL_S = 0.05
_DEVICE_POLL_S = 0.00002

_Arrival = Callable[[float], bool]
"""Waits at most so many seconds for a collective; says whether it is through."""


class _Wait(NamedTuple):
    """One wait for the other ranks."""

    call: Call
    phase: str
    deadline: Deadline


class _Plane(NamedTuple):
    """One plane on its way: the collective that brings it, and where it lands."""

    work: dist.Work | None
    landed: torch.Tensor
    ready: torch.Tensor


class _Landing(NamedTuple):
    """Rows that are on their way."""

    transport: Collective
    call: Call
    shipment: Shipment
    planes: list[_Plane]

    def land(self, *, keep: bool) -> Landed:
        """See `Landing.land`. The result is always the caller's own; waiting is not told apart."""
        return self.transport.land(self.call, self.shipment, self.planes)


class Collective:
    """A transport over a process group.

    Args:
        topology: the group; needs `topology.group`.
        group: the process group that carries the rows.
    """

    name = "collective"
    device_types: tuple[str, ...] = ()
    masks: Masks | None = None
    stream: torch.cuda.Stream | None = None

    def __init__(self, topology: Topology, group: dist.ProcessGroup) -> None:
        self._rank, self._num_ranks = topology.rank, topology.num_ranks
        self._group = group
        self._device = torch.device("cuda" if topology.uses_cuda else "cpu")
        notes = Notes.of(topology)
        if notes is None:
            raise TransportError("needs a torch.distributed process group")
        self._notes = notes

    def route(self, call: Call, header: Header, share: torch.Tensor) -> Routed:
        """See `Transport.route`."""
        routed = self._round(call, header, share)
        check_agreement(
            routed.headers,
            call,
            reason_of=lambda rank: bytes(routed.shares[rank].tolist()).decode(),
        )
        return routed

    def send(self, call: Call, shipment: Shipment) -> _Landing:
        """See `Transport.send`."""
        wait = _Wait(call, "send", Deadline(call.timeout_s))
        planes = [self._start(plane, shipment, wait) for plane in shipment.planes]
        if shipment.num_slots:
            # Whoever has sent may be away for long: it is not late.
            self._notes.leave(call)
        return _Landing(self, call, shipment, planes)

    def _start(self, plane: torch.Tensor, shipment: Shipment, wait: _Wait) -> _Plane:
        out_splits = list(shipment.counts[self._rank])
        in_splits = [row[self._rank] for row in shipment.counts]
        ready = _gather_rows(plane, shipment.sends, out_splits).to(self._device)
        landed = torch.empty(
            (sum(in_splits), plane.shape[1]), dtype=plane.dtype, device=self._device
        )
        with self._diagnosing(wait):
            work = dist.all_to_all_single(
                _bytes_of(landed),
                _bytes_of(ready),
                in_splits,
                out_splits,
                group=self._group,
                async_op=True,
            )
        return _Plane(work, landed, ready)

    def land(self, call: Call, shipment: Shipment, planes: Sequence[_Plane]) -> Landed:
        """Wait for rows that were sent."""
        for plane in planes:
            wait = _Wait(call, "land", Deadline(call.timeout_s))
            with self._diagnosing(wait):
                self._await(plane.work, wait)
        if not shipment.num_slots:
            self._notes.leave(call)
        lengths = [row[self._rank] for row in shipment.counts]
        splits = lengths if shipment.num_slots else [sum(lengths)]
        rows = [
            list(torch.split(flight.landed.to(plane.device), splits))
            for flight, plane in zip(planes, shipment.planes, strict=True)
        ]
        return Landed(rows, [0] * self._num_ranks)

    def refuse(self, call: Call, header: Header, reason: str) -> None:
        """See `Transport.refuse`. Takes part in the round of headers, so it waits for the peers."""
        text = torch.frombuffer(bytearray(reason.encode() or b" "), dtype=torch.uint8)
        self._round(call, header._replace(refused=1, share_bytes=text.numel()), text)

    def fail(self, call: Call, error: BaseException) -> None:
        """See `Transport.fail`. Without a store there is no way to tell, and no use in trying."""
        missing = error.missing if isinstance(error, PeerTimeoutError) else []
        with contextlib.suppress(StoreLostError):
            self._notes.give_up(f"{type(error).__name__}: {error}", missing)

    def memory(self) -> Mapping[str, int]:
        """See `Transport.memory`: nothing is held between calls."""
        return {}

    def local_memory(self) -> torch.Tensor | None:
        """See `Transport.local_memory`."""
        return None

    def close(self) -> None:
        """See `Transport.close`."""

    def _round(self, call: Call, header: Header, share: torch.Tensor) -> Routed:
        """All-gather headers, then shares padded to the longest."""
        self._notes.enter(call, header)
        begin = Deadline(0)
        told = header._replace(entered_us=time.time_ns() // 1000)
        words = torch.tensor(told, dtype=torch.int64, device=self._device)
        headers = [Header(*row.tolist()) for row in self._all_gather(call, "route", words)]
        waited_us = self._waits(headers, begin.waited_us)
        padded = torch.zeros(
            max(header.share_bytes for header in headers), dtype=torch.uint8, device=self._device
        )
        padded[: share.numel()].copy_(share)
        shares = (
            self._all_gather(call, "route", padded) if padded.numel() else [padded] * len(headers)
        )
        cut = zip(shares, headers, strict=True)
        return Routed(headers, [share[: header.share_bytes] for share, header in cut], waited_us)

    def _waits(self, headers: Sequence[Header], waited_us: int) -> list[int]:
        """How long this rank waited for each: by their clocks, never more than by its own."""
        here = headers[self._rank].entered_us
        return [min(max(told.entered_us - here, 0), waited_us) for told in headers]

    def _all_gather(self, call: Call, phase: str, mine: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        start = partial(dist.all_gather, everyone, mine, group=self._group, async_op=True)
        self._carry(start, call, phase)
        return everyone

    def _carry(self, start: Callable[[], dist.Work | None], call: Call, phase: str) -> None:
        """Run a collective to its end."""
        wait = _Wait(call, phase, Deadline(call.timeout_s))
        with self._diagnosing(wait):
            self._await(start(), wait)

    @contextmanager
    def _diagnosing(self, wait: _Wait) -> Iterator[None]:
        """Where a collective breaks or takes too long, say because of whom."""
        try:
            yield
        except TransportError:
            raise
        except RuntimeError as error:
            raise self._diagnose(wait, error) from error

    def _await(self, work: dist.Work | None, wait: _Wait) -> None:
        """Wait in slices, with an eye on the other ranks.

        Raises:
            RuntimeError: the collective broke, or is not through at the deadline.
            TransportError: a peer gave up.
        """
        arrived = self._watch(work)
        while not arrived(_slice_of(wait.deadline)):
            self._heed(wait)
            if wait.deadline.passed:
                raise RuntimeError("the deadline has passed")

    def _watch(self, work: dist.Work | None) -> _Arrival:
        if work is None:
            return lambda longest_s: True
        if self._device.type != "cuda":
            return partial(_wait_for_work, work)
        work.wait()
        here = torch.cuda.Event()
        here.record()
        return partial(_wait_for_device, here)

    def _heed(self, wait: _Wait) -> None:
        """Answer an alarm, and give up where a peer has.

        Raises:
            PeerTimeoutError: a peer gave up because of others than this rank.
            TransportError: a peer gave up for another reason.
        """
        if not self._notes.alarmed():
            return
        self._notes.answer()
        for peer, text, missing in self._notes.failures():
            if missing and self._rank not in missing:
                raise self._timeout(missing, wait, note=f"Reported by rank {peer}.")
            raise TransportError(f"rank {peer} gave up while this rank was in {wait.call}: {text}")

    def _diagnose(self, wait: _Wait, error: RuntimeError) -> TransportError:
        """What to raise after a wait that ended without the others."""
        try:
            self._notes.raise_alarm()
            silent = self._call_the_roll(wait)
            missing = self._behind(wait, silent)
            if missing:
                return self._timeout(missing, wait, note=UNUSABLE_GROUP)
        except StoreLostError as lost:
            return self._diagnose_alone(wait, lost)
        heard = f"ranks {silent} do not answer" if silent else "all ranks answer"
        where = f"{wait.call} failed in phase '{wait.phase}'"
        return TransportError(f"{where}: {error}; {heard}. {UNUSABLE_GROUP}")

    def _call_the_roll(self, wait: _Wait) -> list[int]:
        """The ranks that do not answer.

        A broken connection does not tell whose it was, and who does not answer may be on the way:
        this waits until all but one have answered, or else for the deadline.
        """
        grace = Deadline(_GRACE_S)
        while True:
            self._heed(wait)
            silent = self._notes.silent()
            if self._is_settled(wait, silent, grace=grace):
                return silent
            time.sleep(_POLL_S)

    def _is_settled(self, wait: _Wait, silent: list[int], *, grace: Deadline) -> bool:
        if len(silent) > 1 and wait.call.timeout_s and not wait.deadline.passed:
            return False
        entered = self._notes.entered()
        return grace.passed or not any(entered[r][0] >= wait.call.sequence for r in silent)

    def _behind(self, wait: _Wait, silent: list[int]) -> list[int]:
        """Those who are to blame: who is through with the call is not while another can be.

        Without a deadline nobody is late, and of several nobody can be named.
        """
        if len(silent) > 1 and not wait.call.timeout_s:
            return []
        number, entered = wait.call.sequence, self._notes.entered()
        reached = [rank for rank in silent if entered[rank][0] <= number]
        unfinished = [rank for rank in reached if self._notes.left(rank) < number]
        return unfinished or reached

    def _diagnose_alone(self, wait: _Wait, lost: StoreLostError) -> TransportError:
        """Without the store: of two ranks it is the other, of more it cannot be told."""
        if self._num_ranks > 2:
            return lost
        other = 1 - self._rank
        heard = {other: "unknown, the store of the process group is lost, too"}
        return _timeout_error([other], wait, heard=heard, note=UNUSABLE_GROUP)

    def _timeout(self, missing: list[int], wait: _Wait, *, note: str) -> PeerTimeoutError:
        entered = self._notes.entered()
        heard = {rank: text for rank, (_, text) in entered.items() if rank != self._rank}
        return _timeout_error(missing, wait, heard=heard, note=note)


def _timeout_error(
    missing: list[int], wait: _Wait, *, heard: Mapping[int, str], note: str
) -> PeerTimeoutError:
    return PeerTimeoutError(
        missing,
        operation=str(wait.call.operation),
        epoch=wait.call.sequence,
        phase=wait.phase,
        waited_s=wait.deadline.waited_s,
        peers=heard,
        note=note,
    )


def _slice_of(deadline: Deadline) -> float:
    """How long to wait before the next look around; never 0, which torch takes for ever."""
    left_s = deadline.remaining_s
    return _SLICE_S if left_s is None else min(max(left_s, _SHORTEST_S), _SLICE_S)


def _wait_for_work(work: dist.Work, longest_s: float) -> bool:
    """Whether it is through after so long a wait, which leaves it running if not."""
    try:
        work.wait(timedelta(seconds=longest_s))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()
    return True


def _wait_for_device(here: torch.cuda.Event, longest_s: float) -> bool:
    """Whether the stream has got here after so long a wait."""
    slice_end = Deadline(longest_s)
    while not here.query():
        if slice_end.passed:
            return False
        time.sleep(_DEVICE_POLL_S)
    return True


def _gather_rows(
    plane: torch.Tensor, sends: Sequence[torch.Tensor | slice], lengths: Sequence[int]
) -> torch.Tensor:
    """The rows for all ranks, one rank after the other."""
    rows = torch.empty((sum(lengths), plane.shape[1]), dtype=plane.dtype, device=plane.device)
    for tokens, area in zip(sends, torch.split(rows, list(lengths)), strict=True):
        ops.send(plane, tokens, area)
    return rows


def _bytes_of(rows: torch.Tensor) -> torch.Tensor:
    """Rows as bytes, since not every backend moves every dtype."""
    return rows.view(torch.uint8) if rows.numel() else rows.new_empty(rows.shape, dtype=torch.uint8)
