"""Events: when an operation is over, and what must stay alive until then.

On CPU an operation has happened when its call returns, so an event has nothing to wait for. On
CUDA an event is a `torch.cuda.Event` of the stream that was current when it was made. What to do
between two events is the caller's matter; which stream an operation runs on is the transport's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch

__all__ = ["HERE_AND_NOW", "AnyEvent", "EventHandle", "EventOverlap", "Turn", "wait_for"]


class EventHandle:
    """A point in the work of the current stream.

    Made on a thread that never touched CUDA it marks a point that has already passed.

    Sync: making one never waits.
    """

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():
            self._event = torch.cuda.Event()
            self._event.record()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for this point. The host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """An event together with the tensors that must outlive it.

    Args:
        event: the point to wait for, or None when the operation was synchronous.
        extra_tensors: tensors kept alive as long as this object is.
        check: raises what is known to have gone wrong; called at every wait.

    Used as a context manager it waits on leaving, so that the body overlaps with the operation.
    Lifetime: holds `extra_tensors` until it is waited for or released.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: Sequence[torch.Tensor] | None = None,
        *,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.event = event
        self._check = check
        self.extra_tensors = None if extra_tensors is None else tuple(extra_tensors)
        self._hooks: list[Callable[[], None]] = []

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait for the operation; nothing to do when it was synchronous.

        The host does not wait: it raises what kernels have reported by now.

        Args:
            release_handle: also drop the event and the tensors it kept alive.

        Raises:
            PeerTimeoutError: the operation, or an earlier one, ended without some ranks.
        """
        if self._check is not None:
            self._check()
        if self.event is not None:
            self.event.current_stream_wait()
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()
        if release_handle:
            self.event, self.extra_tensors = None, None

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        """Run `hook()` once, after the next wait."""
        self._hooks.append(hook)

    def __call__(self) -> EventHandle | None:
        """The event, or None when the operation was synchronous."""
        return self.event

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.current_stream_wait()


AnyEvent = EventOverlap | EventHandle | None
"""What callers pass as `previous_event`."""


class Turn:
    """An operation among the caller's streams.

    A synchronous one runs on the current stream, after `previous`. An asynchronous one runs on a
    stream of its own where there is one, after `previous`, or after all that the current stream has
    been given so far.

    Args:
        stream: the stream of its own; None where rows are moved by the host.
        previous: what to wait for first.
        async_finish: whether the caller will wait for the operation.
        check: raises what is known to have gone wrong.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream | None,
        previous: AnyEvent,
        *,
        async_finish: bool,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._check = check
        self._previous = previous
        self._async = async_finish
        self._stream = stream if async_finish else None

    def __enter__(self) -> Turn:
        if self._stream is None:
            if self._previous is not None:
                wait_for(self._previous)
            return self
        self._caller = torch.cuda.current_stream()
        if self._previous is None:
            self._stream.wait_stream(self._caller)
        self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()
        wait_for(self._previous)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._context.__exit__(kind, error, trace)

    def event(self, *tensors: torch.Tensor | None) -> EventOverlap:
        """The event of the operation; a synchronous one leaves nothing to wait for.

        Args:
            *tensors: what it reads and writes: stays allocated until both streams are done with it.
        """
        if not self._async:
            return EventOverlap()
        kept = [tensor for tensor in tensors if tensor is not None]
        if self._stream is not None:
            for tensor in kept:
                tensor.record_stream(self._stream)
                tensor.record_stream(self._caller)
        return EventOverlap(EventHandle(), kept, check=self._check)


HERE_AND_NOW = Turn(None, None, async_finish=False)
"""The turn of every operation that runs on the current stream, and waits for nothing before it."""


def wait_for(previous: AnyEvent) -> None:
    """Make the current stream wait for an event of any kind; None and finished ones are fine."""
    event = previous if isinstance(previous, EventHandle) else getattr(previous, "event", None)
    if event is not None:
        event.current_stream_wait()
