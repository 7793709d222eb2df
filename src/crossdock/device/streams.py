"""Streams: what runs beside what, and what waits for what."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

__all__ = ["Fork"]


class Fork:
    """A second line of work, which the first one waits for at the end of the `with`, come what may.

    So memory of the caller's stream, which the second line reads and writes, is not used again
    before that is over, even if the call goes wrong in between.

    Args:
        stream: where the second line runs; None where there are no streams.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._caller: torch.cuda.Stream | None = None

    def __enter__(self) -> Fork:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._caller is not None and self._stream is not None:
            self._caller.wait_stream(self._stream)

    def line(self) -> AbstractContextManager[object]:
        """What is launched in the body of this runs beside what comes after it."""
        if self._stream is None:
            return nullcontext()
        self._caller = torch.cuda.current_stream()
        self._stream.wait_stream(self._caller)
        context: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return context
