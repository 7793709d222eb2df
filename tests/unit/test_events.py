"""Events on CPU: already over, but with the manners of real ones."""

from __future__ import annotations

import weakref

import torch

from crossdock import Buffer, EventHandle, EventOverlap


def test_a_synchronous_operation_leaves_no_event() -> None:
    overlap = EventOverlap()
    assert overlap.event is None
    overlap.current_stream_wait()


def test_hooks_run_once_after_the_wait() -> None:
    ran: list[int] = []
    overlap = EventOverlap(EventHandle())
    overlap.register_hook_after_wait(lambda: ran.append(1))
    with overlap:
        assert not ran
    overlap.current_stream_wait()
    assert ran == [1]


def test_tensors_live_until_released() -> None:
    tensor = torch.zeros(3)
    alive = weakref.ref(tensor)
    overlap = EventOverlap(EventHandle(), [tensor])
    del tensor
    assert alive() is not None
    overlap.current_stream_wait(release_handle=True)
    assert alive() is None


def test_capture_is_an_event_of_now() -> None:
    overlap = Buffer.capture()
    assert isinstance(overlap.event, EventHandle)
    overlap.event.current_stream_wait()
