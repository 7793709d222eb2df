"""Who takes part in the calls of a transport that can do without some ranks.

Every rank has its own masks: ranks that its caller masked, or that missed a deadline. Its header
shows them, and who hears of a mask in a call takes it over, so that after one call all that are
left agree. A rank that finds itself masked is alone until it is unmasked.
"""

from __future__ import annotations

import logging
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
        if rank not in self.masked:
            self.masked |= {rank}
            self.newcomers -= {rank}
            self.eras[rank] += 1
            self.returning = self.returning and rank != self._rank

    def unmask(self, rank: int) -> None:
        """Count on a rank again. This one may have been masked without knowing."""
        if rank == self._rank:
            self.returning = True
        elif rank in self.masked:
            self.newcomers |= {rank}
        self.masked -= {rank}

    def come_back(self, excluded: int) -> None:
        """The others went on without this rank up to a call, and count on it again."""
        self.returning = False
        if excluded > self.settled:
            self.settled = excluded
            self.eras[self._rank] += 1

    def leave(self, peer: int, call: Call) -> None:
        """A peer goes on without this rank."""
        if not self.is_alone:
            _LOG.warning("rank %d was masked by rank %d in %s", self._rank, peer, call)
        self.mask(self._rank)

    def drop(self, late: Collection[int], call: Call) -> bool:
        """Mask ranks that kept a call waiting, if it goes on without them; whether it does."""
        if not (self.can_shrink and call.operation.can_shrink):
            return False
        _LOG.warning("rank %d masks ranks %s in %s", self._rank, sorted(late), call)
        for rank in late:
            self.mask(rank)
        return True

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
