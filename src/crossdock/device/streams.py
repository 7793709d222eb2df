"""Streams: what runs beside what, and what waits for what."""

from __future__ import annotations

from types import TracebackType

import torch

__all__ = ["Branch"]


class Branch:
    """A second line of work, which the first one waits for at the end of a `with`, come what may.

    So memory of the caller's stream, which the second line reads and writes, is not used again
    before that is over, even if the call goes wrong in between. It serves all calls of a buffer, of
    which there is one at a time.

    Args:
        stream: where the second line runs; None where there are no streams.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._caller: torch.cuda.Stream | None = None
        self._begun: torch.cuda.Event | None = None
        self._ended: torch.cuda.Event | None = None

    def __enter__(self) -> Branch:
        self._caller = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._caller is not None and self._stream is not None:
            self._ended = self._stream.record_event(self._ended)
            self._caller.wait_event(self._ended)

    def begin(self) -> torch.cuda.Stream | None:
        """The stream of the second line, which first waits for what the caller's has had to do."""
        if self._stream is not None:
            self._caller = torch.cuda.current_stream()
            self._begun = self._caller.record_event(self._begun)
            self._stream.wait_event(self._begun)
        return self._stream
