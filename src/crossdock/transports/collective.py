"""Rows moved with `torch.distributed`: any device, any backend, any number of hosts.

Shares travel by all-gather, rows by `all_to_all_single` with splits that every rank knows. Each
rank notes in the group's store which step it has entered; when a wait ends without the others, the
notes tell who is missing. A process group whose collective was abandoned cannot be used again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from crossdock import ops
from crossdock.errors import PeerTimeoutError, TransportError
from crossdock.topology import Topology
from crossdock.transports.base import (
    Call,
    Deadline,
    Header,
    Routed,
    Shipment,
    check_agreement,
)

__all__ = ["Collective"]

_FOREVER = timedelta(days=365)
_GRACE_S = 0.6
_POLL_S = 0.05
_DEVICE_POLL_S = 0.00002


class Collective:
    """A transport over a process group.

    Args:
        topology: the group; needs `topology.group`.
        group: the process group that carries the rows.
    """

    name = "collective"
    device_types: tuple[str, ...] = ()

    def __init__(self, topology: Topology, group: dist.ProcessGroup) -> None:
        self._rank, self._num_ranks = topology.rank, topology.num_ranks
        self._group = group
        self._device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
        made = topology.allgather(time.time_ns())
        self._store = PrefixStore(f"crossdock/{made[0]}", group.get_group_store())

    def route(self, call: Call, header: Header, share: torch.Tensor) -> Routed:
        """See `Transport.route`."""
        routed = self._round(call, header, share)
        check_agreement(
            routed.headers,
            call,
            reason_of=lambda rank: bytes(routed.shares[rank].tolist()).decode(),
        )
        return routed

    def move(self, call: Call, shipment: Shipment, *, keep: bool) -> list[torch.Tensor]:
        """See `Transport.move`. The result is always the caller's own."""
        out_splits = list(shipment.counts[self._rank])
        in_splits = [row[self._rank] for row in shipment.counts]
        received = []
        for plane in shipment.planes:
            ready = _gather_rows(plane, shipment.sends, out_splits).to(self._device)
            landed = torch.empty(
                (sum(in_splits), plane.shape[1]), dtype=plane.dtype, device=self._device
            )
            work = dist.all_to_all_single(
                _bytes_of(landed),
                _bytes_of(ready),
                in_splits,
                out_splits,
                group=self._group,
                async_op=True,
            )
            self._wait(work, call, "land")
            received.append(landed.to(plane.device))
        return received

    def refuse(self, call: Call, header: Header, reason: str) -> None:
        """See `Transport.refuse`. Takes part in the round of headers, so it waits for the peers."""
        text = torch.frombuffer(bytearray(reason.encode() or b" "), dtype=torch.uint8)
        self._round(call, header._replace(refused=1, share_bytes=text.numel()), text)

    def fail(self, call: Call, error: BaseException) -> None:
        """See `Transport.fail`."""
        self._store.set(f"failed/{call.sequence}/{self._rank}", type(error).__name__)

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
        self._store.set(f"at/{self._rank}", f"{call.sequence} {header}")
        words = torch.tensor(header, dtype=torch.int64, device=self._device)
        headers = [Header(*told.tolist()) for told in self._all_gather(call, "route", words)]
        padded = torch.zeros(
            max(header.share_bytes for header in headers), dtype=torch.uint8, device=self._device
        )
        padded[: share.numel()].copy_(share)
        shares = (
            self._all_gather(call, "route", padded) if padded.numel() else [padded] * len(headers)
        )
        cut = zip(shares, headers, strict=True)
        return Routed(headers, [share[: header.share_bytes] for share, header in cut])

    def _all_gather(self, call: Call, phase: str, mine: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        work = dist.all_gather(everyone, mine, group=self._group, async_op=True)
        self._wait(work, call, phase)
        return everyone

    def _wait(self, work: dist.Work, call: Call, phase: str) -> None:
        """Wait for a collective; where it ends without some ranks, find out which."""
        deadline = Deadline(call.timeout_s)
        try:
            if self._device.type == "cuda":
                work.wait()
                _wait_for_device(deadline)
            else:
                work.wait(timedelta(seconds=call.timeout_s) if call.timeout_s else _FOREVER)
        except RuntimeError as error:
            raise self._diagnose(call, phase, error, waited_s=deadline.waited_s) from error

    def _diagnose(
        self, call: Call, phase: str, error: RuntimeError, *, waited_s: float
    ) -> TransportError:
        """Name the ranks that never entered the call, or else those that do not give up with us."""
        try:
            self._store.set(f"failed/{call.sequence}/{self._rank}", "timeout")
            entered = self._entered()
            missing = [rank for rank, (at, _) in entered.items() if at < call.sequence]
            missing = missing or self._silent(call)
        except (RuntimeError, ValueError) as lost:
            return TransportError(f"{call}: {error}; the store does not answer either: {lost}")
        if not missing:
            return TransportError(f"{call} failed in phase '{phase}' on all ranks: {error}")
        return PeerTimeoutError(
            missing,
            operation=str(call.operation),
            epoch=call.sequence,
            phase=phase,
            waited_s=waited_s,
            peers={rank: text for rank, (_, text) in entered.items() if rank != self._rank},
            note="The process group cannot be used any more: make a new one.",
        )

    def _entered(self) -> dict[int, tuple[int, str]]:
        """The last call that each rank has entered, as a number (0 for none) and in words."""
        entered = {}
        for rank in range(self._num_ranks):
            key = f"at/{rank}"
            noted = self._store.get(key).decode() if self._store.check([key]) else f"0 {Header()}"
            number, text = noted.split(" ", 1)
            entered[rank] = (int(number), text)
        return entered

    def _silent(self, call: Call) -> list[int]:
        """Ranks that do not say within a moment that they gave the same call up."""
        silent = list(range(self._num_ranks))
        grace = Deadline(_GRACE_S)
        while silent and not grace.passed:
            time.sleep(_POLL_S)
            silent = [r for r in silent if not self._store.check([f"failed/{call.sequence}/{r}"])]
        return silent


def _wait_for_device(deadline: Deadline) -> None:
    """Wait until the current stream has got here, looking at the clock.

    Raises:
        RuntimeError: it has not before the deadline.
    """
    here = torch.cuda.Event()
    here.record()
    while not here.query():
        if deadline.passed:
            raise RuntimeError("the device did not finish in time")
        time.sleep(_DEVICE_POLL_S)


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
