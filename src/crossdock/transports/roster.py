"""Who takes part in the calls of a transport that can do without some ranks.

Every rank has its own masks: ranks that its caller masked, or that missed a deadline. Its header
shows them, and who hears of a mask in a call takes it over. Ranks are only dropped while at least
half of those that were left remain: a few that are early must not go on without the many.

A rank is told of every call that is made without it. It then knows that it is alone, until it is
unmasked; and it comes back in the first call whose header counts on it again, with the number and
the masks of that header. Every masking begins a new *era* of the rank: what was begun in another
era does not count.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

from crossdock.transports.header import Call, Header

__all__ = ["MAX_MASKABLE_RANKS", "Roster"]

MAX_MASKABLE_RANKS = 62
"""Ranks that fit into the mask of a header."""

_LOG = logging.getLogger("crossdock")


class Roster:
    """The ranks that this rank counts on.

    Args:
        rank: this rank.
        num_ranks: ranks of the group.
        can_shrink: whether ranks may be masked at all.

    Attributes:
        masked: the ranks it goes on without; this one among them means that the others went on.
        newcomers: ranks that were unmasked since the last call, and owe nothing from before.
        returning: this rank itself was unmasked, and has to ask what call comes next.
        settled: the last call that others made without this rank before it came back.
        eras: how often each rank was masked: what was begun in another era does not count.
    """

    def __init__(self, rank: int, num_ranks: int, *, can_shrink: bool) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self.can_shrink = can_shrink
        self.masked: frozenset[int] = frozenset()
        self.newcomers: frozenset[int] = frozenset()
        self.returning = False
        self.settled = 0
        self._lock = threading.Lock()
        self.eras = [0] * num_ranks

    @property
    def bits(self) -> int:
        """The masked ranks, a bit each."""
        return sum(1 << rank for rank in self.masked)

    @property
    def is_alone(self) -> bool:
        """Whether the others go on without this rank."""
        return self._rank in self.masked

    def absent(self) -> frozenset[int]:
        """Ranks that take no part in a call, seen from here: all, where this rank is masked."""
        return frozenset(range(self._num_ranks)) if self.is_alone else self.masked

    def mask(self, rank: int) -> None:
        """Go on without a rank."""
        with self._lock:
            self._mask(rank)

    def _mask(self, rank: int) -> None:
        if rank not in self.masked:
            self.masked |= {rank}
            self.newcomers -= {rank}
            self.eras[rank] += 1
            self.returning = self.returning and rank != self._rank

    def unmask(self, rank: int) -> None:
        """Count on a rank again. This one may have been masked without knowing."""
        with self._lock:
            if rank == self._rank:
                self.returning = True
            elif rank in self.masked:
                self.newcomers |= {rank}
            self.masked -= {rank}

    def come_back(self, excluded: int, header: Header | None) -> None:
        """Count on those that a header counts on, after the others went on without this rank.

        Args:
            excluded: the last call that was made without it.
            header: that counts on it again; None if nobody went on without it.
        """
        with self._lock:
            self.returning = False
            if header is None:
                return
            self.settled = excluded
            self.eras[self._rank] += 1
            others = frozenset(range(self._num_ranks)) - {self._rank}
            for rank in others:
                if header.masked >> rank & 1:
                    self._mask(rank)
                else:
                    self.masked -= {rank}
            self.newcomers = others - self.masked

    def may_drop(self, late: Collection[int]) -> bool:
        """Whether enough ranks are left without these."""
        left = self._num_ranks - len(self.masked)
        return 2 * (left - len(set(late) - self.masked)) >= left

    def leave(self, peer: int, call: Call) -> None:
        """A peer goes on without this rank."""
        if not self.is_alone:
            _LOG.warning("rank %d was masked by rank %d in %s", self._rank, peer, call)
        self.mask(self._rank)

    def drop(self, late: Collection[int], call: Call) -> None:
        """Mask ranks that kept a call waiting."""
        _LOG.warning("rank %d masks ranks %s in %s", self._rank, sorted(late), call)
        for rank in late:
            self.mask(rank)

    def settle_in(self) -> None:
        """A call has begun with the newcomers: from now on they owe what all owe."""
        self.newcomers = frozenset()

    def hear(self, peer: int, header: Header, call: Call) -> None:
        """Take over the masks that a peer shows in this call."""
        if peer in self.masked or header.sequence < call.sequence:
            return
        if header.sequence > call.sequence or header.masked >> self._rank & 1:
            self.leave(peer, call)
            return
        for rank in range(self._num_ranks):
            if header.masked >> rank & 1:
                self.mask(rank)
