"""The calls of one buffer: numbered, one at a time, and never left in silence.

Every call has the same number on all ranks. When one goes wrong here the peers are told, so that
they raise a reason instead of waiting for a deadline. What the calls do is the exchange's matter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import cast

import torch

from crossdock.errors import (
    BufferTooSmallError,
    HandleError,
    PeerRefusedError,
    RankMismatchError,
    TransportError,
    UnsupportedError,
)
from crossdock.formats import RowFormat
from crossdock.transports.base import Carrier, Landed, Landing, Routed, Shipment, Transport
from crossdock.transports.header import Call, Header, Operation

__all__ = ["MAX_IN_FLIGHT", "Attempt", "Receive", "Session", "Timeouts"]

MAX_IN_FLIGHT = 2
"""Calls of one kind that may wait for their receiving half at a time."""

_IN_STEP = (RankMismatchError, PeerRefusedError, BufferTooSmallError, UnsupportedError)
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
    """One call on its way through the transport, to the end of the `with` that it is made for."""

    __slots__ = ("_session", "call", "entered", "is_flight", "open")

    def __init__(self, session: Session, call: Call) -> None:
        self._session = session
        self.call = call
        self.entered = self.open = self.is_flight = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._session.end(self, error)

    @property
    def _transport(self) -> Transport:
        # Only the host's verbs route and send, and they are given transports that can.
        return cast("Transport", self._session.transport)

    def header(self, form: RowFormat, **rest: int) -> Header:
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

    def send(self, shipment: Shipment) -> Landing:
        """See `Transport.send`. Waiting for the rows is `Session.receive`'s matter."""
        landing = self._transport.send(self.call, shipment)
        self.open = False
        return landing

    def move(self, shipment: Shipment, *, keep: bool) -> Landed:
        """Send rows and wait for those that come."""
        landed = self._transport.send(self.call, shipment).land(keep=keep)
        self.open = False
        return landed


class Receive:
    """The receiving half of a call: run once, by any thread; again, it only raises what it raised.

    Sync: waits for the rows of all ranks. Collective: no; in any order with other calls.
    """

    def __init__(self, run: Callable[[], None], done: Callable[[], None]) -> None:
        self._run: Callable[[], None] | None = run
        self._done = done
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def __call__(self) -> None:
        """Receive."""
        with self._lock:
            run, self._run = self._run, None
            if self._error is not None:
                raise self._error
            if run is None:
                return
            try:
                run()
            except BaseException as error:
                self._error = error
                raise
            finally:
                # What it holds of the landing zone goes before another call may ask for one.
                del run
                self._done()


class _Flights:
    """Counts the calls whose receiving half has not run.

    Calls begin one at a time; they end in any thread, which needs no lock: both are one step.
    """

    def __init__(self) -> None:
        self._flying: dict[Operation, list[None]] = {operation: [] for operation in Operation}

    def begin(self, operation: Operation) -> None:
        """Count one more.

        Raises:
            HandleError: there are as many as there may be.
        """
        flying = self._flying[operation]
        if len(flying) >= MAX_IN_FLIGHT:
            raise HandleError(
                f"{MAX_IN_FLIGHT} calls of {operation} are in flight already: "
                f"run the hook of one of them first"
            )
        flying.append(None)

    def end(self, operation: Operation) -> None:
        """Count one less."""
        self._flying[operation].pop()


class _Checking:
    """The time before a call: what goes wrong then leaves through the call, as if in it."""

    __slots__ = ("_operation", "_session")

    def __init__(self, session: Session, operation: Operation) -> None:
        self._session, self._operation = session, operation

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self._session.refuse(self._operation, error)


class Session:
    """Takes calls to a transport, in order.

    Args:
        transport: what carries the rows.
        timeouts: how long waits may last.
    """

    def __init__(self, transport: Carrier, timeouts: Timeouts) -> None:
        self.transport = transport
        self.closed = False
        self._timeouts = timeouts
        self._lock = threading.Lock()
        self._sequence = 0
        self._used: set[Operation] = set()
        self._flights = _Flights()
        self._failure: TransportError | None = None

    def call(self, operation: Operation) -> Attempt:
        """The next call, for a `with`: it has the buffer for itself until that is left.

        If it goes wrong here, the peers hear of it.

        Raises:
            TransportError: an earlier call made the buffer unusable.
        """
        self._lock.acquire()
        try:
            self.check()
            first = operation not in self._used
            timeout_s = self._timeouts.first_call_s if first else self._timeouts.steady_s
            call, masks = Call(operation, self._sequence + 1, timeout_s), self.transport.masks
            if masks is not None:
                call = call._replace(sequence=masks.catch_up(call))
            self._sequence = call.sequence
            return Attempt(self, call)
        except BaseException:
            self._lock.release()
            raise

    def flight(self, operation: Operation) -> Attempt:
        """A call whose receiving half may run later: in flight until that has, or it goes wrong.

        Raises:
            HandleError: too many are in flight already.
            Others: as `call`.
        """
        attempt = self.call(operation)
        try:
            self._flights.begin(operation)
        except HandleError as error:
            self.end(attempt, error)
            raise
        attempt.is_flight = True
        return attempt

    def end(self, attempt: Attempt, error: BaseException | None) -> None:
        """A call is over, or went wrong here."""
        try:
            if error is None:
                self._used.add(attempt.call.operation)
            else:
                self._tell(attempt, error)
        finally:
            self._lock.release()
            if error is not None and attempt.is_flight:
                self._flights.end(attempt.call.operation)

    def receive(self, call: Call, run: Callable[[], None], *, hooked: bool) -> Receive | None:
        """The receiving half of a call, after which it is in flight no more.

        Returns:
            What runs it, if it is to run later; None if it has run.
        """
        if hooked:
            return Receive(
                partial(self._land, call, run), partial(self._flights.end, call.operation)
            )
        try:
            self._land(call, run)
        finally:
            self._flights.end(call.operation)
        return None

    def _land(self, call: Call, run: Callable[[], None]) -> None:
        """Wait for the rows of an earlier call, beside other calls; the peers hear if it fails."""
        self.check()
        try:
            run()
        except BaseException as error:
            self._give_up(call, error)
            raise

    def _give_up(self, call: Call, error: BaseException) -> None:
        told = f"{call} was abandoned: {type(error).__name__}: {error}"
        self._failure = error if isinstance(error, TransportError) else TransportError(told)
        if not self.closed:
            self.transport.fail(call, error)

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
            self._give_up(call, error)

    def refuse(self, operation: Operation, error: Exception) -> None:
        """Instead of a call, whose arguments are wrong: the peers hear of it and need not wait."""
        self.end(self.call(operation), error)

    def checking(self, operation: Operation) -> _Checking:
        """Check the arguments of a call before it, and refuse it if they are wrong."""
        return _Checking(self, operation)

    def settle_in(self) -> None:
        """All ranks are here: from now on every wait has the steady deadline."""
        self._used.update(Operation)

    def abandon(self, error: TransportError) -> None:
        """From now on, raise this: no later call can find the ranks in step."""
        self._failure = error

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
