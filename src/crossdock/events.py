"""Events: when an operation is over, and what must stay alive until then.

On CPU an operation has happened when its call returns, so an event has nothing to wait for. On
CUDA an event is a `torch.cuda.Event` of the stream that was current when it was made. What to do
between two events is the caller's matter; which stream an operation runs on is the transport's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import torch

__all__ = ["EventHandle", "EventOverlap", "event_after"]


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

    Used as a context manager it waits on leaving, so that the body overlaps with the operation.
    Lifetime: holds `extra_tensors` until it is waited for or released.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = None if extra_tensors is None else tuple(extra_tensors)
        self._hooks: list[Callable[[], None]] = []

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait for the operation; nothing to do when it was synchronous.

        Args:
            release_handle: also drop the event and the tensors it kept alive.
        """
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


def event_after(async_finish: bool, *tensors: torch.Tensor) -> EventOverlap:
    """The event of an operation that read `tensors`; a synchronous one leaves nothing to wait for.

    Args:
        async_finish: whether the caller will wait for it.
        *tensors: kept alive until then.
    """
    return EventOverlap(EventHandle(), tensors) if async_finish else EventOverlap()
