"""Memory that the processes of one Linux host share.

A segment is an anonymous memory file (memfd): it has no name in any file system, so it is gone
with the last process that maps it, however that process ends, and `/dev/shm` is never touched (in
containers that is often 64 MB). Peers open it through `/proc/<pid>/fd/<fd>`, which needs the same
user and pid namespace; `transports.select` finds out beforehand whether that works.

What lies in a segment is the one-sided transport's matter.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from crossdock.errors import TransportError

__all__ = ["Address", "Segment", "ShmHeap", "attach"]

_NAME = "crossdock"


class Address(NamedTuple):
    """Where a peer finds a segment: integers, so that it fits into control words."""

    pid: int
    fd: int
    nbytes: int


class Segment:
    """Memory of this process that peers can map.

    Args:
        nbytes: size; reserved at once, so that a host without memory is an error here and not a
            crash at the first write.

    Raises:
        OSError: the memory cannot be had.

    Lifetime: the descriptor closes with this object, the memory lives until its last mapping.
    """

    def __init__(self, nbytes: int) -> None:
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
            self.memory = mmap.mmap(self._fd, nbytes)
        except BaseException:
            os.close(self._fd)
            raise
        self.address = Address(os.getpid(), self._fd, nbytes)

    def close(self) -> None:
        """Give up the descriptor: nobody can attach any more. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()


def attach(address: Address) -> mmap.mmap:
    """Map a peer's segment.

    Raises:
        TransportError: it cannot be opened, or is not what its address says.
    """
    path = f"/proc/{address.pid}/fd/{address.fd}"
    try:
        if f"memfd:{_NAME}" not in str(Path(path).readlink()):
            raise TransportError(f"{path} is not a crossdock segment: its owner has gone")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"cannot open the memory of process {address.pid}: {error}") from error
    try:
        return mmap.mmap(fd, address.nbytes)
    except (OSError, ValueError) as error:
        raise TransportError(f"cannot map the memory of process {address.pid}: {error}") from error
    finally:
        os.close(fd)


class ShmHeap:
    """The segments of all ranks, mapped here.

    Args:
        segment: this rank's.
        addresses: every rank's, in rank order, this rank's included.

    Raises:
        TransportError: a peer's segment cannot be mapped.

    Lifetime: tensors made of the heap keep its memory mapped after the heap itself has gone.
    """

    def __init__(self, segment: Segment, addresses: Sequence[Address]) -> None:
        self._segment = segment
        self.nbytes = segment.address.nbytes
        self._maps = [
            segment.memory if address == segment.address else attach(address)
            for address in addresses
        ]
        self._tensors = [torch.frombuffer(memory, dtype=torch.uint8) for memory in self._maps]

    def peer(self, rank: int) -> torch.Tensor:
        """The memory of `rank` as uint8 [nbytes]."""
        return self._tensors[rank]

    def words(self, rank: int) -> memoryview:
        """The memory of `rank` as 64-bit integers."""
        return memoryview(self._maps[rank]).cast("q")

    def span(self, rank: int, begin: int, end: int) -> memoryview:
        """Bytes of the memory of `rank`; an object of its own, whose end can be watched."""
        return memoryview(self._maps[rank])[begin:end]
