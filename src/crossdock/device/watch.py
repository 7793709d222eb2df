"""What kernels tell the host when ranks do not come.

A kernel cannot raise. It writes which ranks it missed, and in what, to memory that the host reads
without asking the device, and ends; the host raises at its next call. The buffer is of no use then,
the device is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch

from crossdock.errors import PeerTimeoutError, TransportError
from crossdock.ops.triton import (
    expert_rows,
    expert_sends,
    expert_sums,
    rank_places,
    rank_routes,
    rank_rows,
    rank_sums,
    row_checks,
)
from crossdock.transports.symmetric import GAVE_UP

__all__ = ["HostWords", "Report", "State"]

_PHASES = MappingProxyType(
    {
        int(expert_rows.COUNTS.value): "route",
        int(expert_rows.ROWS.value): "land",
        int(expert_sends.CREDIT.value): "send",
        int(expert_sums.WEIGHTS.value): "route",
        int(expert_sums.SUMS.value): "land",
        int(expert_sums.CREDIT.value): "send",
        int(rank_routes.COUNTS.value): "route",
        int(rank_rows.CREDIT.value): "send",
        int(rank_rows.NUMBERED.value): "send",
        int(rank_places.ROWS.value): "land",
        int(rank_sums.KEPT.value): "route",
        int(rank_sums.CREDIT.value): "send",
        int(rank_sums.SUMS.value): "land",
    }
)


class State:
    """Indices of the rounds that are counted; of low-latency calls, plus the zone."""

    LOW_LATENCY_DISPATCH = 0
    LOW_LATENCY_COMBINE = 2
    ROUTE = 4
    SEND = 5
    PLACE = 6
    COMBINE = 7


_OPERATIONS = (
    ("low latency dispatch", 2, 0),
    ("low latency dispatch", 2, 1),
    ("low latency combine", 2, 0),
    ("low latency combine", 2, 1),
    ("dispatch", 1, 0),
    ("dispatch", 1, 0),
    ("dispatch", 1, 0),
    ("combine", 1, 0),
)
_ROUNDS = 1 << 32
"""Numbers of rounds; on a device the second half of them is negative."""


def _host_memory(num_words: int, device: torch.device) -> torch.Tensor:
    """Words on the host that kernels can write: [num_words] int64, zero."""
    words = torch.zeros(num_words, dtype=torch.int64, device="cpu")
    return words.pin_memory() if device.type == "cuda" else words


class HostWords:
    """Words that a kernel writes for the host, the first of them last; that is 0 until then.

    Args:
        number: of words.
        device: where the kernel runs.

    Attributes:
        address: where they lie.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        words = _host_memory(number, device)
        self.number, self.address = number, words.data_ptr()
        self._seen = words.numpy()

    def clear(self) -> None:
        """Make ready for the next time."""
        self._seen[0] = 0

    @property
    def have_come(self) -> bool:
        """Whether they are written."""
        return bool(self._seen[0])

    def numbers(self) -> list[int]:
        """What was written, and more behind it that is of earlier times."""
        numbers: list[int] = self._seen.tolist()
        return numbers


def _is_before(round_: int, number: int) -> bool:
    """Whether a round is before another one; numbers begin again behind the largest."""
    return 0 < (number - round_) % _ROUNDS < _ROUNDS // 2


def _describe(rounds: Sequence[int]) -> str:
    """What a rank has come to, in words."""
    named: dict[str, int] = {}
    for (name, _, _), number in zip(_OPERATIONS, rounds, strict=True):
        named[name] = named.get(name, 0) + number % _ROUNDS
    told = [f"{name} {number}" for name, number in named.items() if number]
    return f"has come to {', '.join(told)}" if told else "nothing yet"


class Report:
    """Memory that kernels write and the host reads.

    Args:
        num_ranks: R.
        device: where the kernels run.
    """

    def __init__(self, num_ranks: int, device: torch.device) -> None:
        self._words = _host_memory(num_ranks + 1, device)
        self._seen = self._words.numpy()

    @property
    def address(self) -> int:
        """Where kernels write."""
        return self._words.data_ptr()

    def is_empty(self) -> bool:
        """Whether nothing has failed so far."""
        return not self._seen[-1]

    def error(
        self,
        waited_s: float,
        entered: Sequence[Sequence[int]],
        reason_of: Callable[[int], str],
    ) -> TransportError:
        """What was missed, as an error; or who gave up.

        A rank that came, but waits for one that did not, is not missing, though its rows are.

        Args:
            waited_s: the deadline that passed.
            entered: the last round of each operation that each rank has come to.
            reason_of: why a rank gave up.
        """
        *words, failed = (int(word) for word in self._seen)
        late = [rank for rank, word in enumerate(words) if word]
        if not late:
            rank = failed - GAVE_UP
            return TransportError(f"rank {rank} gave up in the middle of a call: {reason_of(rank)}")
        kind, number = (words[late[0]] >> 8) & 0xFF, (words[late[0]] >> 32) % _ROUNDS
        name, step, offset = _OPERATIONS[kind]
        epoch = (number - 1) * step + offset + 1
        if words[late[0]] & 0xFF == row_checks.DAMAGE.value:
            return TransportError(f"{name} {epoch}: rows of ranks {late} have come damaged")
        called = State.SEND if kind == State.PLACE else kind
        absent = [rank for rank, rounds in enumerate(entered) if _is_before(rounds[called], number)]
        return PeerTimeoutError(
            absent or late,
            operation=name,
            epoch=epoch,
            phase=_PHASES[words[late[0]] & 0xFF],
            waited_s=waited_s,
            peers={rank: _describe(rounds) for rank, rounds in enumerate(entered)},
        )
