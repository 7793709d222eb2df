"""Memory of one GPU that kernels on every GPU of the group can address.

The only place that touches torch's symmetric memory, which is not public: it makes the allocation,
exchanges handles, and maps the peers' memory here, over NVLink or PCIe. Multicast is never used.
What lies in the memory is the device calls' matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from crossdock.errors import TransportError
from crossdock.topology import Topology

__all__ = ["CudaHeap", "Gpu", "check_peer_access", "this_gpu"]


class Gpu(NamedTuple):
    """A rank's GPU: its unique name, and what it is."""

    uuid: str
    name: str


def this_gpu() -> Gpu:
    """The GPU that is current on this rank."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(str(found.uuid), found.name)


def check_peer_access(gpus: Sequence[Gpu]) -> str:
    """What keeps this rank's GPU from reaching the others; empty if nothing does.

    GPUs that this process cannot see (`CUDA_VISIBLE_DEVICES`) are taken to be reachable: mapping
    their memory will tell.

    Args:
        gpus: every rank's, in rank order.
    """
    here = torch.cuda.current_device()
    mine = this_gpu().uuid
    seen = {
        str(torch.cuda.get_device_properties(index).uuid): index
        for index in range(torch.cuda.device_count())
    }
    shared = [rank for rank, gpu in enumerate(gpus) if gpu.uuid == mine]
    if len(shared) > 1:
        return f"ranks {shared} use the same GPU: call torch.cuda.set_device(local rank) first"
    unreachable = [
        rank
        for rank, gpu in enumerate(gpus)
        if gpu.uuid in seen
        and seen[gpu.uuid] != here
        and not torch.cuda.can_device_access_peer(here, seen[gpu.uuid])
    ]
    if not unreachable:
        return ""
    return (
        f"its GPU has no peer-to-peer access to those of ranks {unreachable} "
        f"(see nvidia-smi topo -p2p rw)"
    )


class CudaHeap:
    """The memory of all ranks, mapped here.

    Args:
        topology: the group; needs a torch process group.
        nbytes: size, the same on all ranks.

    Collective: all ranks. Sync: waits for all of them.
    Lifetime: of this object; tensors made of it keep it.

    Raises:
        TransportError: the memory cannot be had, or not be mapped.
    """

    def __init__(self, topology: Topology, nbytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        group = topology.group or dist.group.WORLD
        if group is None:
            raise TransportError("symmetric memory needs a torch.distributed process group")
        self.nbytes = nbytes
        device = torch.device("cuda", torch.cuda.current_device())
        try:
            self._local = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
            self._mapped = symmetric.rendezvous(self._local, group.group_name)
        except RuntimeError as error:
            raise TransportError(f"no symmetric memory of {nbytes} bytes: {error}") from error
        self.addresses = [int(address) for address in self._mapped.buffer_ptrs]
        self._local.zero_()
        torch.cuda.synchronize()

    def peer(self, rank: int) -> torch.Tensor:
        """The memory of `rank` as uint8 [nbytes]."""
        mapped: torch.Tensor = self._mapped.get_buffer(rank, (self.nbytes,), torch.uint8)
        return mapped
