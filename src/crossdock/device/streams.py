"""Streams: what runs beside what, and what waits for what."""

from __future__ import annotations

from types import TracebackType

import torch

__all__ = ["Fork"]


class Fork:
    """A second line of work: what is launched in its body runs beside what comes after it.

    Memory that is allocated after it belongs to the caller's stream alone.

    Args:
        stream: where the body runs; None where there are no streams.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> Fork:
        if self._stream is not None:
            self._caller = torch.cuda.current_stream()
            self._stream.wait_stream(self._caller)
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._context.__exit__(kind, error, trace)

    def join(self) -> None:
        """Let the caller's stream wait for it."""
        if self._stream is not None:
            self._caller.wait_stream(self._stream)
