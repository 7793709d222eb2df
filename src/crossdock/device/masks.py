"""Which ranks the low-latency calls of a device go on without.

The kernels keep the masks: a word for each rank in the memory of every rank, which waits look at.
The host sets and reads them in the order of the stream. A rank whose mask is taken away may have
missed calls: whoever counts on it again writes to it how many rounds there were.

R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from crossdock.device.memory import NUM_STATES, Generation, Memory
from crossdock.errors import HandleError, PeerTimeoutError
from crossdock.transports.base import Deadline
from crossdock.transports.header import Call

__all__ = ["DeviceMasks"]

_LOOK_AGAIN_S = 1e-4


class DeviceMasks:
    """See `transports.base.Masks`.

    Args:
        memory: where the masks lie; there are none before the first call.
        chain: lets the current stream wait for what the buffer has launched.
        rank: this rank.
    """

    def __init__(self, memory: Memory, chain: Callable[[], None], *, rank: int) -> None:
        self._memory, self._chain, self._rank = memory, chain, rank
        self._num_ranks = memory.num_ranks
        self._returns = [0] * memory.num_ranks
        self._is_returning = False

    def mask(self, rank: int) -> None:
        """See `Masks.mask`. Before the first call there is nobody to go on without."""
        if (current := self._memory.current) is not None:
            self._chain()
            current.masked[rank] = 1

    def unmask(self, rank: int) -> None:
        """See `Masks.unmask`. Sync: waits for what this rank has launched.

        Raises:
            HandleError: a call is in flight, in the middle of a round.
        """
        current = self._memory.current
        if current is None:
            return
        self._chain()
        if not int(current.masked[rank]):
            return
        if current.has_flights:
            raise HandleError("a rank returns between calls: run the hooks first")
        current.masked[rank] = 0
        self._returns[rank] += 1
        if rank == self._rank:
            self._is_returning = True
            return
        if not int(current.masked[self._rank]):
            words = current.welcome_of(rank)[self._rank]
            words[:NUM_STATES] = current.states >> 32 << 32
            rest = [*current.turns, self._returns[rank]]
            words[NUM_STATES:] = torch.tensor(rest, dtype=torch.int64, device=words.device)

    def masked(self) -> frozenset[int]:
        """See `Masks.masked`. Sync: waits for what this rank has launched."""
        current = self._memory.current
        if current is None:
            return frozenset()
        self._chain()
        return frozenset(current.masked.nonzero().flatten().tolist())

    def catch_up(self, call: Call) -> int:
        """See `Masks.catch_up`. Takes over the rounds of those that count on this rank again."""
        if self._is_returning and self._memory.current is not None:
            self._take_over(self._memory.current, call)
        return call.sequence

    def _take_over(self, current: Generation, call: Call) -> None:
        begin = Deadline(call.timeout_s)
        while not begin.passed:
            for *rounds, dispatches, combines, nth in current.welcome_of(self._rank).tolist():
                if nth == self._returns[self._rank]:
                    current.states.copy_(torch.tensor(rounds, dtype=torch.int64, device="cpu"))
                    current.turns = [dispatches, combines]
                    self._is_returning = False
                    return
            time.sleep(_LOOK_AGAIN_S)
        raise PeerTimeoutError(
            [rank for rank in range(self._num_ranks) if rank != self._rank],
            operation=str(call.operation),
            epoch=call.sequence,
            phase="return",
            waited_s=begin.waited_s,
            peers={},
        )
