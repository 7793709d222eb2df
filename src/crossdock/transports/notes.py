"""What ranks tell one another through the store of their group, beside the collectives.

A collective that hangs does not say because of whom. So every rank notes where it stands, a rank
that gives up says so, and on an alarm those that are alive answer: whoever does not is known. When
to look, and what to conclude, is the collective transport's matter.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

from torch.distributed.distributed_c10d import PrefixStore

from crossdock.errors import StoreLostError
from crossdock.topology import Topology
from crossdock.transports.header import Call, Header

__all__ = ["UNUSABLE_GROUP", "Notes"]

UNUSABLE_GROUP = "The process group cannot be used any more: make a new one."


class Notes:
    """What the ranks of a group tell one another through its store, beside the collectives.

    Args:
        store: where the notes are kept, and nothing else.
        rank: this rank.
        num_ranks: ranks of the group.
    """

    def __init__(self, store: PrefixStore, *, rank: int, num_ranks: int) -> None:
        self._store, self._rank = store, rank
        self._ranks = range(num_ranks)

    @classmethod
    def of(cls, topology: Topology) -> Notes | None:
        """Notes of this buffer alone; None where the group has no store.

        Collective: all ranks. Sync: waits for them.
        """
        if topology.group is None:
            return None
        made = topology.allgather(time.time_ns())
        store = PrefixStore(f"crossdock/{made[0]}", topology.group.get_group_store())
        return cls(store, rank=topology.rank, num_ranks=topology.num_ranks)

    def enter(self, call: Call, header: Header) -> None:
        """Note that this rank has come to a call."""
        self._set(f"at/{self._rank}", f"{call.sequence} {header}")

    def leave(self, call: Call) -> None:
        """Note that this rank has all that it waited for in a call."""
        self._set(f"done/{self._rank}", str(call.sequence))

    def give_up(self, text: str, missing: list[int]) -> None:
        """Note that this rank has left a call for good, why, and because of whom."""
        self._set(f"failed/{self._rank}", json.dumps({"text": text, "missing": missing}))
        self.raise_alarm()

    def raise_alarm(self) -> None:
        """Ask every rank that waits to say that it is alive."""
        self._set("alarm", "1")

    def alarmed(self) -> bool:
        """Whether some rank is in trouble."""
        return bool(self._get("alarm"))

    def answer(self) -> None:
        """Say that this rank is alive."""
        self._set(f"here/{self._rank}", "1")

    def silent(self) -> list[int]:
        """The ranks that neither answered nor gave up."""
        return [r for r in self._ranks if not (self._get(f"here/{r}") or self._get(f"failed/{r}"))]

    def entered(self) -> dict[int, tuple[int, str]]:
        """The last call that each rank has come to, as a number (0 for none) and in words."""
        noted = {rank: self._get(f"at/{rank}", f"0 {Header()}") for rank in self._ranks}
        split = {rank: text.split(" ", 1) for rank, text in noted.items()}
        return {rank: (int(number), text) for rank, (number, text) in split.items()}

    def left(self, rank: int) -> int:
        """The last call with which a rank was through; 0 for none."""
        return int(self._get(f"done/{rank}", "0"))

    def failures(self) -> Iterator[tuple[int, str, list[int]]]:
        """The other ranks that gave up, in rank order: which, why and because of whom."""
        for rank in self._ranks:
            noted = self._get(f"failed/{rank}") if rank != self._rank else ""
            if noted:
                cause = json.loads(noted)
                yield rank, cause["text"], cause["missing"]

    def _set(self, key: str, value: str) -> None:
        with _reaching_the_store():
            self._store.set(key, value)

    def _get(self, key: str, default: str = "") -> str:
        with _reaching_the_store():
            return self._store.get(key).decode() if self._store.check([key]) else default


@contextlib.contextmanager
def _reaching_the_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise StoreLostError(
            "the store of the process group does not answer, so it cannot be told which ranks are "
            f"missing; the host of the store is among the suspects. {UNUSABLE_GROUP} ({error})"
        ) from error
