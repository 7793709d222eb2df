"""The words by which ranks that share memory tell each other where they stand.

Every rank owns a control segment with one block per peer, and only that peer writes the block.
Signals hold the number of a call and only ever grow, so nothing is cleaned, and a waiter asks for
"at least this call". Headers alternate between two slots: a rank may post call `n` once every peer
has entered call `n - 1`, for by then nobody still reads the slot of call `n - 2`.

Rows are written before the signal that covers them. That the reader sees them in this order is
x86-64's promise for ordinary stores and loads; other processors take another transport.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import NamedTuple

from crossdock.errors import PeerTimeoutError, TransportError
from crossdock.transports.base import Deadline, Heap
from crossdock.transports.header import HEADER_WORDS, Call, Header
from crossdock.transports.roster import Roster

__all__ = ["BLOCK_BYTES", "Control", "Signal"]

BLOCK_BYTES = 2048
_BLOCK_WORDS = BLOCK_BYTES // 8
_FAILED, _WAITING, _ALIVE, _EXCLUDED, _EXCLUDED_FROM, _NOTE, _NOTE_WORDS = 4, 5, 6, 7, 8, 9, 4
_HEADERS = _NOTE + _NOTE_WORDS
_REASONS = _HEADERS + 2 * HEADER_WORDS
_TEXT_WORDS = (_BLOCK_WORDS - _REASONS) // 3
_CAUSE = _REASONS + 2 * _TEXT_WORDS
_CAUSE_BYTES = _TEXT_WORDS * 8 // 3
_BEAT_NS = 20_000_000
_ALIVE_NS = 500_000_000
_LOOK_AGAIN_S = 0.05


class Signal(IntEnum):
    """Words of a block that hold the number of the latest call to have got so far."""

    POSTED = 0
    SHARED = 1
    LANDED = 2
    GROWN = 3


class _Wanted(NamedTuple):
    """What a wait is for: a signal with at least this number, of some ranks or all."""

    signal: Signal
    number: int
    phase: str
    among: Collection[int] | None = None


class Backoff:
    """How a wait passes the time: gives the core away at first, then sleeps."""

    _YIELDS = 200
    _LONGEST_S = 0.001

    def __init__(self) -> None:
        self._yields = 0
        self._sleep_s = 0.00002

    def pause(self) -> bool:
        """Let others run, with the GIL released; whether this has become a sleep."""
        if self._yields < self._YIELDS:
            self._yields += 1
            os.sched_yield()
            return False
        time.sleep(self._sleep_s)
        self._sleep_s = min(self._sleep_s * 1.5, self._LONGEST_S)
        return True


class Control:
    """Posts this rank's words to its peers, and waits for theirs.

    Args:
        heap: control segments of all ranks, at least `num_ranks * BLOCK_BYTES` each.
        rank: this rank.
        num_ranks: ranks of the group.
        roster: whom to wait for; None for everybody.
    """

    def __init__(
        self, heap: Heap, *, rank: int, num_ranks: int, roster: Roster | None = None
    ) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._roster = roster or Roster(rank, num_ranks, can_shrink=False)
        self._mine = heap.words(rank)
        self._theirs = [heap.words(peer) for peer in range(num_ranks)]
        self._beaten = 0
        self._shut_out: set[int] = set()
        self._told = {
            signal: [self._at(peer, signal) for peer in range(num_ranks)] for signal in Signal
        }
        self._failures = [(r, self._at(r, _FAILED)) for r in range(num_ranks) if r != rank]

    def post_header(self, call: Call, header: Header, *, reason: str = "") -> None:
        """Write the header to every peer, with a reason when it is a refusal, and signal it."""
        begin = self._at(self._rank, self._slot(call.sequence))
        raw = memoryview(array("q", header))
        for words in self._theirs:
            if reason:
                self._write_text(words, self._reason_at(call), reason)
            words[begin : begin + HEADER_WORDS] = raw
        self.signal(Signal.POSTED, call)

    def headers(self, call: Call) -> list[Header]:
        """Every rank's header of this call, empty ones of absent ranks; valid once all posted."""
        slot, absent = self._slot(call.sequence), self._roster.absent()
        return [
            Header() if peer in absent else self._header(peer, slot)
            for peer in range(self._num_ranks)
        ]

    def reason_of(self, call: Call, peer: int) -> str:
        """The reason that a peer gave for refusing this call."""
        return self._text(peer, self._reason_at(call))

    def post_note(self, call: Call, note: Sequence[int]) -> None:
        """Write a few integers to every peer, and signal them as `GROWN`."""
        for words in self._theirs:
            for index, value in enumerate(note):
                words[self._at(self._rank, _NOTE + index)] = value
        self.signal(Signal.GROWN, call)

    def notes(self) -> list[list[int]]:
        """Every rank's last note."""
        return [
            [self._mine[self._at(peer, _NOTE + index)] for index in range(_NOTE_WORDS)]
            for peer in range(self._num_ranks)
        ]

    def signal(self, signal: Signal, call: Call, *, peer: int | None = None) -> None:
        """Tell one peer, or all, that this rank has got so far in this call."""
        at = self._told[signal][self._rank]
        for words in self._theirs if peer is None else [self._theirs[peer]]:
            words[at] = call.sequence

    def wait(
        self, signal: Signal, call: Call, *, phase: str, among: Collection[int] | None = None
    ) -> list[int]:
        """Wait until ranks have signalled this call.

        Args:
            signal: what they signal.
            call: the call.
            phase: for errors.
            among: the ranks; None for all that are not masked.

        Returns:
            How long each rank was waited for, in microseconds.

        Raises:
            PeerTimeoutError: some did not before the deadline.
            TransportError: a rank failed meanwhile.
        """
        return self._wait(_Wanted(signal, call.sequence, phase, among), call)

    def wait_for_call_before(self, call: Call) -> None:
        """Wait until every rank has entered the call before this one. Raises: as `wait`."""
        among = set(range(self._num_ranks)) - self._roster.newcomers
        self._wait(_Wanted(Signal.POSTED, call.sequence - 1, "route", among), call)

    def _wait(self, wanted: _Wanted, call: Call) -> list[int]:
        begin, deadline, backoff = Deadline(0), Deadline(call.timeout_s), Backoff()
        waited_us = [0] * self._num_ranks
        missing = self._behind(wanted, call)
        try:
            while missing:
                failed = self._failed()
                if failed and self._may_shrink(wanted, call) and self._roster.may_drop(failed):
                    self._drop(failed, call)
                elif failed:
                    self._raise_failures(failed, call, phase=wanted.phase, waited_s=begin.waited_s)
                if deadline.passed:
                    deadline = self._give_up(missing, wanted, call, waited_s=begin.waited_s)
                if backoff.pause():
                    self._beat()
                for peer in missing:
                    waited_us[peer] = begin.waited_us
                missing = self._behind(wanted, call)
        finally:
            if self._beaten:
                self._show_waiting(0)
        return waited_us

    def _behind(self, wanted: _Wanted, call: Call) -> list[int]:
        """The ranks that have not signalled what is wanted; masked ones are not asked.

        Who has signalled is looked up first, and what they show is heard then: no header may come
        in between and be passed over.
        """
        told = self._told[wanted.signal]
        everyone = range(self._num_ranks) if wanted.among is None else wanted.among
        ranks = [peer for peer in everyone if peer != self._rank]
        missing = [peer for peer in ranks if self._mine[told[peer]] < wanted.number]
        if self._roster.can_shrink:
            self._hear(call)
        absent = self._roster.absent()
        return [peer for peer in missing if peer not in absent]

    def _hear(self, call: Call) -> None:
        """Take over the masks that headers of this call show, and see who goes on alone."""
        posted = self._told[Signal.POSTED]
        for peer in range(self._num_ranks):
            if peer == self._rank or peer in self._roster.masked:
                continue
            if self._is_excluded(peer, call):
                self._roster.leave(peer, call)
            elif self._mine[posted[peer]] >= call.sequence:
                self._roster.hear(peer, self._header(peer, self._slot(call.sequence)), call)

    def _is_excluded(self, peer: int, call: Call) -> bool:
        """Whether a peer makes this call without this rank."""
        first = self._mine[self._at(peer, _EXCLUDED_FROM)]
        last = self._mine[self._at(peer, _EXCLUDED)]
        return last > self._roster.settled and first <= call.sequence <= last

    def exclude(self, ranks: Collection[int], call: Call) -> None:
        """Tell ranks that this one makes a call without them, and from which call on it does."""
        self._shut_out &= self._roster.masked
        for rank in ranks:
            if rank not in self._shut_out:
                self._theirs[rank][self._at(self._rank, _EXCLUDED_FROM)] = call.sequence
            self._theirs[rank][self._at(self._rank, _EXCLUDED)] = call.sequence
        self._shut_out |= set(ranks)

    def _give_up(
        self, missing: list[int], wanted: _Wanted, call: Call, *, waited_s: float
    ) -> Deadline:
        """At the deadline: raise, look again, or go on without those who are late."""
        if not self._may_shrink(wanted, call):
            late = self._not_waiting(missing) or missing
            raise self._timeout(late, call, wanted.phase, waited_s=waited_s)
        late = self._late(missing, call)
        is_last_look = waited_s > call.timeout_s * self._num_ranks
        if not is_last_look and not (late and self._roster.may_drop(late)):
            return Deadline(_LOOK_AGAIN_S)
        if not self._roster.may_drop(late or missing):
            raise self._timeout(late or missing, call, wanted.phase, waited_s=waited_s)
        self._drop(late or missing, call)
        return Deadline(call.timeout_s)

    def _late(self, missing: Sequence[int], call: Call) -> list[int]:
        """Those who had all the time: who was kept waiting by somebody else had less."""
        since = time.monotonic_ns() - int(call.timeout_s * 1e9)
        return [rank for rank in missing if self._mine[self._at(rank, _ALIVE)] < since]

    def _may_shrink(self, wanted: _Wanted, call: Call) -> bool:
        """Whether a wait may end without somebody. While memory is made it may not."""
        droppable = wanted.signal in {Signal.POSTED, Signal.LANDED}
        return droppable and self._roster.can_shrink and call.operation.can_shrink

    def _drop(self, late: Sequence[int], call: Call) -> None:
        """Mask ranks, and tell them."""
        self._roster.drop(late, call)
        self.exclude(late, call)

    def catch_up(self, call: Call) -> int:
        """The number of a call, for a rank that comes back: that of a header that counts on it.

        Raises:
            PeerTimeoutError: no rank came with such a call before the deadline.
        """
        deadline, backoff = Deadline(call.timeout_s), Backoff()
        peers = [peer for peer in range(self._num_ranks) if peer != self._rank]
        while True:
            excluded = max((self._mine[self._at(peer, _EXCLUDED)] for peer in peers), default=0)
            if excluded <= self._roster.settled:
                self._roster.come_back(excluded, None)
                return call.sequence
            header = self._welcome(peers, excluded)
            if header is not None:
                self._roster.come_back(excluded, header)
                return header.sequence
            if deadline.passed:
                raise self._timeout(peers, call, "return", waited_s=deadline.waited_s)
            backoff.pause()

    def _welcome(self, peers: Sequence[int], excluded: int) -> Header | None:
        """A header of the newest call, if all that made it count on this rank; else None."""
        last = [self._last_header(peer) for peer in peers]
        newest = max(header.sequence for header in last)
        latest = [header for header in last if header.sequence == newest]
        masked = any(header.masked >> self._rank & 1 for header in latest)
        return None if masked or newest <= excluded else latest[0]

    def _beat(self) -> None:
        """Show the peers now and then that this rank is itself waiting.

        The clock is the host's, the same for all ranks; a beat that is old is a dead rank's.
        """
        now = time.monotonic_ns()
        if now - self._beaten >= _BEAT_NS:
            self._show_waiting(now)

    def _show_waiting(self, since: int) -> None:
        self._beaten = since
        for words in self._theirs:
            words[self._at(self._rank, _WAITING)] = since
            if since:
                words[self._at(self._rank, _ALIVE)] = since

    def _not_waiting(self, ranks: Sequence[int]) -> list[int]:
        """Those that are not themselves waiting for somebody else."""
        since = time.monotonic_ns() - _ALIVE_NS
        return [rank for rank in ranks if self._mine[self._at(rank, _WAITING)] < since]

    def fail(self, call: Call, error: BaseException) -> None:
        """Tell every peer at once that this rank gave up, and because of whom."""
        text = f"{type(error).__name__}: {error}".encode()[:_CAUSE_BYTES].decode(errors="ignore")
        missing = error.missing if isinstance(error, PeerTimeoutError) else []
        cause = json.dumps({"text": text, "missing": missing}, ensure_ascii=False)
        for words in self._theirs:
            self._write_text(words, _CAUSE, cause)
            words[self._at(self._rank, _FAILED)] = call.sequence

    def _failed(self) -> list[int]:
        """The ranks that gave up; masked ones are not asked."""
        absent = self._roster.absent()
        return [peer for peer, at in self._failures if self._mine[at] and peer not in absent]

    def _raise_failures(
        self, failed: Sequence[int], call: Call, *, phase: str, waited_s: float
    ) -> None:
        for peer in failed:
            cause = json.loads(self._text(peer, _CAUSE))
            if cause["missing"] and self._rank not in cause["missing"]:
                note = f"Reported by rank {peer}."
                raise self._timeout(cause["missing"], call, phase, waited_s=waited_s, note=note)
            raise TransportError(
                f"rank {peer} gave up while this rank was in {call}: {cause['text']}"
            )

    def _timeout(
        self, missing: list[int], call: Call, phase: str, *, waited_s: float, note: str = ""
    ) -> PeerTimeoutError:
        peers = {r: str(self._last_header(r)) for r in range(self._num_ranks) if r != self._rank}
        return PeerTimeoutError(
            missing,
            operation=str(call.operation),
            epoch=call.sequence,
            phase=phase,
            waited_s=waited_s,
            peers=peers,
            note=note,
        )

    def _last_header(self, peer: int) -> Header:
        slots = (self._header(peer, self._slot(parity)) for parity in (0, 1))
        return max(slots, key=lambda header: header.sequence)

    def _header(self, peer: int, slot: int) -> Header:
        begin = self._at(peer, slot)
        return Header(*self._mine[begin : begin + HEADER_WORDS].tolist())

    def _write_text(self, words: memoryview, word: int, text: str) -> None:
        raw = text.encode()[: _TEXT_WORDS * 8 - 1]
        begin = self._at(self._rank, word) * 8
        words.cast("B")[begin : begin + len(raw) + 1] = raw + b"\0"

    def _text(self, peer: int, word: int) -> str:
        begin = self._at(peer, word) * 8
        raw = self._mine.cast("B")[begin : begin + _TEXT_WORDS * 8].tobytes()
        return raw.split(b"\0", 1)[0].decode(errors="replace")

    @staticmethod
    def _reason_at(call: Call) -> int:
        return _REASONS + (call.sequence % 2) * _TEXT_WORDS

    @staticmethod
    def _slot(sequence: int) -> int:
        return _HEADERS + (sequence % 2) * HEADER_WORDS

    @staticmethod
    def _at(writer: int, word: int) -> int:
        return writer * _BLOCK_WORDS + word
