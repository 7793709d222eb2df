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
from collections.abc import Sequence
from enum import IntEnum

from crossdock.errors import PeerTimeoutError, TransportError
from crossdock.transports.base import HEADER_WORDS, Call, Deadline, Header, Heap

__all__ = ["BLOCK_BYTES", "Control", "Signal"]

BLOCK_BYTES = 1024
_BLOCK_WORDS = BLOCK_BYTES // 8
_FAILED, _NOTE, _HEADERS, _TEXT = 4, 5, 9, 9 + 2 * HEADER_WORDS
_NOTE_WORDS = _HEADERS - _NOTE
_TEXT_BYTES = (_BLOCK_WORDS - _TEXT) * 8
_CAUSE_BYTES = _TEXT_BYTES // 3


class Signal(IntEnum):
    """Words of a block that hold the number of the latest call to have got so far."""

    POSTED = 0
    SHARED = 1
    LANDED = 2
    GROWN = 3


class Backoff:
    """How a wait passes the time: gives the core away at first, then sleeps."""

    _YIELDS = 200
    _LONGEST_S = 0.001

    def __init__(self) -> None:
        self._yields = 0
        self._sleep_s = 0.00002

    def pause(self) -> None:
        """Let others run; releases the GIL."""
        if self._yields < self._YIELDS:
            self._yields += 1
            os.sched_yield()
            return
        time.sleep(self._sleep_s)
        self._sleep_s = min(self._sleep_s * 1.5, self._LONGEST_S)


class Control:
    """Posts this rank's words to its peers, and waits for theirs.

    Args:
        heap: control segments of all ranks, at least `num_ranks * BLOCK_BYTES` each.
        rank: this rank.
        num_ranks: ranks of the group.
    """

    def __init__(self, heap: Heap, *, rank: int, num_ranks: int) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._mine = heap.words(rank)
        self._theirs = [heap.words(peer) for peer in range(num_ranks)]
        self._told = {
            signal: [self._at(peer, signal) for peer in range(num_ranks)] for signal in Signal
        }
        self._failed = [self._at(peer, _FAILED) for peer in range(num_ranks) if peer != rank]

    def post_header(self, call: Call, header: Header, *, reason: str = "") -> None:
        """Write the header to every peer, with a reason when it is a refusal, and signal it."""
        begin = self._at(self._rank, self._slot(call.sequence))
        raw = memoryview(array("q", header))
        for words in self._theirs:
            if reason:
                self._write_text(words, reason)
            words[begin : begin + HEADER_WORDS] = raw
        self.signal(Signal.POSTED, call)

    def headers(self, call: Call) -> list[Header]:
        """Every rank's header of this call; valid once all have posted."""
        return [self._header(peer, self._slot(call.sequence)) for peer in range(self._num_ranks)]

    def reason_of(self, peer: int) -> str:
        """The text a peer wrote beside its last refusal or failure."""
        begin = self._at(peer, _TEXT) * 8
        raw = self._mine.cast("B")[begin : begin + _TEXT_BYTES].tobytes()
        return raw.split(b"\0", 1)[0].decode(errors="replace")

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

    def wait(self, signal: Signal, call: Call, *, phase: str, sequence: int | None = None) -> None:
        """Wait until every rank has signalled this call, or the given earlier one.

        Raises:
            PeerTimeoutError: some did not before the deadline.
            TransportError: a rank failed meanwhile.
        """
        wanted = call.sequence if sequence is None else sequence
        deadline, backoff = Deadline(call.timeout_s), Backoff()
        missing = list(range(self._num_ranks))
        while missing := [r for r in missing if self._mine[self._told[signal][r]] < wanted]:
            if any(self._mine[at] for at in self._failed):
                self._raise_failures(call, phase, deadline.waited_s)
            if deadline.passed:
                raise self._timeout(missing, call, phase, waited_s=deadline.waited_s)
            backoff.pause()

    def fail(self, call: Call, error: BaseException) -> None:
        """Tell every peer at once that this rank gave up, and because of whom."""
        text = f"{type(error).__name__}: {error}".encode()[:_CAUSE_BYTES].decode(errors="ignore")
        missing = error.missing if isinstance(error, PeerTimeoutError) else []
        cause = json.dumps({"text": text, "missing": missing}, ensure_ascii=False)
        for words in self._theirs:
            self._write_text(words, cause)
            words[self._at(self._rank, _FAILED)] = call.sequence

    def _raise_failures(self, call: Call, phase: str, waited_s: float) -> None:
        for peer in range(self._num_ranks):
            if peer == self._rank or not self._mine[self._at(peer, _FAILED)]:
                continue
            cause = json.loads(self.reason_of(peer))
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

    def _write_text(self, words: memoryview, text: str) -> None:
        raw = text.encode()[: _TEXT_BYTES - 1]
        begin = self._at(self._rank, _TEXT) * 8
        words.cast("B")[begin : begin + len(raw) + 1] = raw + b"\0"

    @staticmethod
    def _slot(sequence: int) -> int:
        return _HEADERS + (sequence % 2) * HEADER_WORDS

    @staticmethod
    def _at(writer: int, word: int) -> int:
        return writer * _BLOCK_WORDS + word
