"""The calls of one buffer: numbered, one at a time, and never left in silence.

Every call has the same number on all ranks. When one goes wrong here the peers are told, so that
they raise a reason instead of waiting for a deadline. What the calls do is the exchange's matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from crossdock.errors import (
    BufferTooSmallError,
    PeerRefusedError,
    RankMismatchError,
    TransportError,
)
from crossdock.formats import TokenFormat
from crossdock.transports.base import Call, Header, Operation, Routed, Shipment, Transport

__all__ = ["Attempt", "Session", "Timeouts"]

_IN_STEP = (RankMismatchError, PeerRefusedError, BufferTooSmallError)
"""Errors that every rank raises in the same call, so that the next call finds all ranks in step."""


@dataclass(frozen=True)
class Timeouts:
    """How long waits may last, in seconds; 0 for ever.

    Attributes:
        first_call_s: in the first call of each operation, when ranks may still be compiling.
        steady_s: later.
    """

    first_call_s: float
    steady_s: float


class Attempt:
    """One call on its way through the transport."""

    def __init__(self, call: Call, transport: Transport) -> None:
        self.call = call
        self.entered = False
        self.open = False
        self._transport = transport

    def header(self, form: TokenFormat, **rest: int) -> Header:
        """A header for this call, with rows of this format."""
        return Header(
            operation=self.call.operation,
            sequence=self.call.sequence,
            hidden=form.hidden,
            format_code=form.code,
            **rest,
        )

    def route(self, header: Header, share: torch.Tensor | None = None) -> Routed:
        """See `Transport.route`."""
        self.entered = self.open = True
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        return self._transport.route(self.call, header, nothing if share is None else share)

    def move(self, shipment: Shipment, *, keep: bool) -> list[torch.Tensor]:
        """See `Transport.move`."""
        rows = self._transport.move(self.call, shipment, keep=keep)
        self.open = False
        return rows


class Session:
    """Takes calls to a transport, in order.

    Args:
        transport: what carries the rows.
        timeouts: how long waits may last.
    """

    def __init__(self, transport: Transport, timeouts: Timeouts) -> None:
        self.transport = transport
        self.closed = False
        self._timeouts = timeouts
        self._lock = threading.Lock()
        self._sequence = 0
        self._used: set[Operation] = set()
        self._failure: TransportError | None = None

    @contextmanager
    def call(self, operation: Operation) -> Iterator[Attempt]:
        """Number a call, and let the peers know if it goes wrong here.

        Raises:
            TransportError: an earlier call made the buffer unusable.
        """
        with self._lock:
            self.check()
            self._sequence += 1
            first = operation not in self._used
            timeout_s = self._timeouts.first_call_s if first else self._timeouts.steady_s
            attempt = Attempt(Call(operation, self._sequence, timeout_s), self.transport)
            try:
                yield attempt
            except BaseException as error:
                self._tell(attempt, error)
                raise
            self._used.add(operation)

    def _tell(self, attempt: Attempt, error: BaseException) -> None:
        """After an error: tell the peers what they cannot know."""
        call = attempt.call
        if not attempt.entered and isinstance(error, Exception):
            header = Header(operation=call.operation, sequence=call.sequence)
            try:
                self.transport.refuse(call, header, f"{type(error).__name__}: {error}")
            except TransportError as lost:
                self._failure = lost
        elif (attempt.open or not attempt.entered) and not isinstance(error, _IN_STEP):
            told = f"{call} was abandoned: {type(error).__name__}: {error}"
            self._failure = error if isinstance(error, TransportError) else TransportError(told)
            self.transport.fail(call, error)

    @contextmanager
    def checking(self, operation: Operation) -> Iterator[None]:
        """Check the arguments of a call before it: the peers hear of an error and need not wait."""
        try:
            yield
        except Exception as error:
            with self.call(operation):
                raise error  # noqa: TRY201 - it leaves through the call, which tells the peers

    def settle_in(self) -> None:
        """All ranks are here: from now on every wait has the steady deadline."""
        self._used.update(Operation)

    def check(self) -> None:
        """Raise what made this buffer unusable, if anything did."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Give up the transport's memory, after a call of another thread. Local and idempotent."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._failure = TransportError("this buffer was destroyed")
                self.transport.close()
