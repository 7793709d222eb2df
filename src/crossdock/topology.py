"""Who is in the group, on which host, and which rank owns which expert.

Ranks are found to share a host by the host's identity, never by arithmetic on rank numbers. How
ranks reach each other is decided later, by the transports.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from crossdock.errors import ConfigError, ShapeError

__all__ = ["Communicator", "Topology", "num_local_experts"]


class Communicator(Protocol):
    """What a buffer needs of an mpi4py-like communicator."""

    def Get_rank(self) -> int: ...  # noqa: N802, D102 - mpi4py's name
    def Get_size(self) -> int: ...  # noqa: N802, D102 - mpi4py's name
    def allgather(self, value: Any) -> list[Any]: ...  # noqa: D102 - mpi4py's name


def _read_first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _host_identity() -> str:
    """Equal for processes of one host and pid namespace, which see each other in /proc."""
    boot = _read_first_line("/proc/sys/kernel/random/boot_id") or socket.gethostname()
    try:
        namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        namespace = "-"
    return f"{boot}/{namespace}"


@dataclass(frozen=True)
class Topology:
    """The members of a group and where they are.

    Attributes:
        rank: this rank.
        num_ranks: ranks of the group.
        hosts: identity of each rank's host.
        machines: instruction set of each rank's processor, e.g. "x86_64".
        allgather: exchanges one Python object per rank; collective, blocking.
        group: the torch process group, or None.
    """

    rank: int
    num_ranks: int
    hosts: tuple[str, ...]
    machines: tuple[str, ...]
    allgather: Callable[[Any], list[Any]]
    group: dist.ProcessGroup | None = None

    @classmethod
    def discover(
        cls, group: dist.ProcessGroup | None = None, comm: Communicator | None = None
    ) -> Topology:
        """Find out who is there.

        Collective: all ranks of the group. Sync: waits for every rank, as long as the group does.

        Args:
            group: a torch process group of any backend.
            comm: an mpi4py-like communicator. With neither, the default process group if there
                is one, else a world of this rank alone.

        Raises:
            ConfigError: both were given, or this process is no member of the group.
        """
        rank, num_ranks, allgather, group = _bootstrap(group, comm)
        told = allgather((_host_identity(), platform.machine()))
        hosts, machines = zip(*told, strict=True)
        return cls(rank, num_ranks, hosts, machines, allgather, group)

    @property
    def uses_cuda(self) -> bool:
        """Whether the group's backend moves CUDA tensors."""
        return self.group is not None and "nccl" in dist.get_backend(self.group)

    @property
    def scale_up_ranks(self) -> tuple[int, ...]:
        """Ranks on this rank's host, itself included, ascending."""
        mine = self.hosts[self.rank]
        return tuple(rank for rank, host in enumerate(self.hosts) if host == mine)


_Bootstrap = tuple[int, int, Callable[[Any], list[Any]], "dist.ProcessGroup | None"]


def _bootstrap(group: dist.ProcessGroup | None, comm: Communicator | None) -> _Bootstrap:
    if group is not None and comm is not None:
        raise ConfigError("give group or comm, not both")
    if comm is not None:
        return comm.Get_rank(), comm.Get_size(), comm.allgather, None
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None:
        return 0, 1, lambda value: [value], None
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ConfigError("this process is not a member of the group")

    def allgather(value: Any) -> list[Any]:
        values: list[Any] = [None] * num_ranks
        dist.all_gather_object(values, value, group=group)
        return values

    return rank, num_ranks, allgather, group


def num_local_experts(num_experts: int, num_ranks: int) -> int:
    """Experts a rank owns; expert `e` lives on rank `e // num_local_experts`.

    Raises:
        ShapeError: the experts do not divide evenly over the ranks.
    """
    if num_experts <= 0 or num_experts % num_ranks:
        raise ShapeError(
            "num_experts", got=num_experts, expected=f"a positive multiple of {num_ranks} ranks"
        )
    return num_experts // num_ranks
