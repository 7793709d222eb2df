"""Start the ranks of a test program. The only reader of the environment in this distribution."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

__all__ = ["init_dist"]


def _read(name: str, default: str) -> str:
    return os.environ.get(name, default)  # noqa: TID251 (the launcher's variables, not crossdock's)


def init_dist(local_rank: int, num_local_ranks: int) -> tuple[int, int, dist.ProcessGroup]:
    """Join the default process group as one of `num_local_ranks` processes of this host.

    nccl and the rank's own GPU as default device where CUDA is available, gloo and the CPU
    elsewhere. Either way the default dtype becomes bfloat16, as DeepEP's programs expect.

    Environment: `MASTER_ADDR` (127.0.0.1), `MASTER_PORT` (8361), `WORLD_SIZE` (1) and `RANK` (0);
    the last two count hosts, not processes.

    Args:
        local_rank: number of this process on its host, from 0.
        num_local_ranks: processes on each host.

    Returns:
        (rank, number of ranks, a group of all ranks).

    **Collective**: every process of every host. **Sync**: the host waits for all of them.
    """
    num_hosts, host = int(_read("WORLD_SIZE", "1")), int(_read("RANK", "0"))
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        backend="nccl" if use_cuda else "gloo",
        init_method=f"tcp://{_read('MASTER_ADDR', '127.0.0.1')}:{_read('MASTER_PORT', '8361')}",
        world_size=num_hosts * num_local_ranks,
        rank=host * num_local_ranks + local_rank,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if use_cuda else "cpu")
    num_ranks = dist.get_world_size()
    return dist.get_rank(), num_ranks, dist.new_group(list(range(num_ranks)))
