"""Every exception that crossdock raises.

    CrossdockError
    ├─ ConfigError (ValueError)            asked for something impossible
    │   ├─ ShapeError                      an argument has the wrong shape, dtype or value range
    │   ├─ UnsupportedError                no transport, device or version covers the request
    │   └─ RankMismatchError               the ranks of a group disagree; raised on every rank
    ├─ TransportError (RuntimeError)       the exchange itself failed
    │   ├─ PeerTimeoutError (TimeoutError) a rank did not come; names which, where and how long
    │   ├─ PeerRefusedError                a rank would not take part in a call; names it and why
    │   ├─ StoreLostError                  the store of the process group does not answer
    │   └─ BufferTooSmallError             a limit on memory was exceeded; says by how much
    ├─ HandleError (RuntimeError)          a handle is stale, foreign or of the wrong mode
    └─ MissingDependencyError (ImportError)  an optional package is missing; gives the command

An error carries its facts as attributes, so that callers need not parse messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "BufferTooSmallError",
    "ConfigError",
    "CrossdockError",
    "HandleError",
    "MissingDependencyError",
    "PeerRefusedError",
    "PeerTimeoutError",
    "RankMismatchError",
    "ShapeError",
    "StoreLostError",
    "TransportError",
    "UnsupportedError",
]


class CrossdockError(Exception):
    """Base of everything that crossdock raises on purpose. Survives pickling with its facts."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[Exception], args: tuple[Any, ...], facts: dict[str, Any]) -> Exception:
    builtin: Any = kind
    while builtin.__module__ == __name__:
        builtin = builtin.__base__  # the one whose memory layout this error has
    error: Exception = builtin.__new__(kind, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class ConfigError(CrossdockError, ValueError):
    """Something impossible was asked for; where one rank can know, before any communication."""


class ShapeError(ConfigError):
    """An argument has the wrong shape, dtype or range.

    Attributes:
        argument: name of the argument.
        got: what was passed, as text.
        expected: what would have been right, as text.
    """

    def __init__(self, argument: str, *, got: object, expected: str) -> None:
        self.argument = argument
        self.got = got
        self.expected = expected
        super().__init__(f"{argument}: got {got}, expected {expected}")


class UnsupportedError(ConfigError):
    """Nothing here covers the request.

    Attributes:
        request: what was asked for.
        reasons: candidate -> why it does not do.
    """

    def __init__(self, request: str, reasons: Mapping[str, str] | None = None) -> None:
        self.request = request
        self.reasons = dict(reasons or {})
        lines = [f"  {candidate}: {reason}" for candidate, reason in self.reasons.items()]
        super().__init__("\n".join([request, *lines]))


class RankMismatchError(ConfigError):
    """The ranks of a group disagree. Raised on every rank of the group.

    Attributes:
        field: what they disagree on.
        values: rank -> its value.
    """

    def __init__(self, field: str, values: Mapping[int, object], *, where: str = "") -> None:
        self.field = field
        self.values = dict(values)
        told = ", ".join(f"rank {rank}: {value}" for rank, value in sorted(self.values.items()))
        at = f" in {where}" if where else ""
        super().__init__(f"ranks disagree on {field}{at}: {told}")


class TransportError(CrossdockError, RuntimeError):
    """The exchange failed: a peer gave up, a connection broke, memory could not be had."""


class PeerTimeoutError(TransportError, TimeoutError):
    """Some ranks did not come before the deadline.

    Attributes:
        missing: the ranks that did not come, ascending.
        operation: what this rank was doing ("dispatch", "combine", ...).
        epoch: number of the call in this buffer, from 1; the same on all ranks.
        phase: the step that was waited for: "route" (headers and routing), "grow" (memory), "send"
            or "land" (rows), or "return" (a call that counts on this rank again).
        waited_s: how long this rank waited, in seconds.
        peers: rank -> the last that was heard of it, as text.
    """

    def __init__(
        self,
        missing: Sequence[int],
        *,
        operation: str,
        epoch: int,
        phase: str,
        waited_s: float,
        peers: Mapping[int, str],
        note: str = "",
    ) -> None:
        self.missing = sorted(missing)
        self.operation = operation
        self.epoch = epoch
        self.phase = phase
        self.waited_s = waited_s
        self.peers = dict(peers)
        names = ", ".join(str(rank) for rank in self.missing)
        told = "; ".join(f"rank {rank}: {text}" for rank, text in sorted(self.peers.items()))
        super().__init__(
            f"{operation} {epoch}: rank(s) {names} did not come within {waited_s:.1f} s "
            f"(waiting in phase '{phase}'). Last heard: {told}. "
            "Every rank must make the same calls in the same order, within the deadline."
            + (f" {note}" if note else "")
        )


class PeerRefusedError(TransportError):
    """A rank refused a call because of its own arguments. Raised on every other rank.

    The refusing rank raises what it found wrong; the buffer stays usable on all of them.

    Attributes:
        rank: the rank that refused.
        operation: what was refused.
        reason: what that rank said.
    """

    def __init__(self, rank: int, *, operation: str, reason: str) -> None:
        self.rank = rank
        self.operation = operation
        self.reason = reason
        super().__init__(f"rank {rank} refused {operation}: {reason}")


class StoreLostError(TransportError):
    """The store of the process group does not answer: its host is gone, or cannot be reached."""


class BufferTooSmallError(TransportError):
    """A call needs more memory than a limit allows.

    Attributes:
        needed_bytes: bytes the call needs.
        have_bytes: bytes the limit allows.
        argument: the constructor argument that sets the limit.
        rank: the rank whose request exceeded it.
    """

    def __init__(self, needed_bytes: int, have_bytes: int, *, argument: str, rank: int) -> None:
        self.needed_bytes = needed_bytes
        self.have_bytes = have_bytes
        self.argument = argument
        self.rank = rank
        super().__init__(
            f"rank {rank} needs {needed_bytes} bytes of buffer, but {argument} allows "
            f"{have_bytes}: raise {argument}, or send fewer tokens a call"
        )


class HandleError(CrossdockError, RuntimeError):
    """A handle does not belong to this call: stale, foreign, or of another mode."""


class MissingDependencyError(CrossdockError, ImportError):
    """An optional package is not installed.

    Attributes:
        package: what could not be imported.
        command: the command that installs it.
    """

    def __init__(self, package: str, *, extra: str) -> None:
        self.package = package
        self.command = f'pip install "crossdock[{extra}]"'
        super().__init__(f"{package} is not installed; run: {self.command}")
