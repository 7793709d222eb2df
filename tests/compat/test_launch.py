"""The ways a program comes to its ranks: torchrun, `mp.spawn` with `init_dist`, and mpi4py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deep_ep
from crossdock.worlds import Pool

PROGRAM = "tests.compat.intranode_program"
LOW_LATENCY_PROGRAM = "tests.compat.low_latency_program"
ROOT = Path(__file__).parents[2]


def run_program(*command: str, variables: Mapping[str, str] | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        timeout=90,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_torchrun() -> None:
    arguments = ("--standalone", "--nproc-per-node=2", "-m", PROGRAM, "--num-tokens=16")
    told = run_program("torch.distributed.run", *arguments)
    assert "24 combinations passed on 2 ranks" in told


def spawn_program(program: str) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = ("--num-processes=2", "--num-tokens=16")
    return run_program(program, *arguments, variables={"MASTER_PORT": port})


def test_spawn_with_init_dist() -> None:
    assert "24 combinations passed on 2 ranks" in spawn_program(PROGRAM)


def test_spawn_of_the_low_latency_program() -> None:
    assert "24 rounds passed on 2 ranks" in spawn_program(LOW_LATENCY_PROGRAM)


class MpiLike:
    """The three methods of `mpi4py.MPI.Comm` that are asked for, and nothing else."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def Get_rank(self) -> int:  # noqa: N802 (mpi4py's name)
        return self._group.rank()

    def Get_size(self) -> int:  # noqa: N802 (mpi4py's name)
        return self._group.size()

    def allgather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._group.size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def round_over_comm(group: dist.ProcessGroup) -> tuple[bool, int, int, bool]:
    """Rank r sends one token to each rank; what comes back is four times what was sent."""
    comm = MpiLike(group)
    with deep_ep.Buffer(group=None, num_nvl_bytes=1 << 16, num_rdma_bytes=0, comm=comm) as buffer:
        x = torch.full((1, 16), float(1 + group.rank()), dtype=torch.bfloat16)
        topk_idx = torch.arange(group.size()).view(1, -1)
        per_rank, _, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(
            topk_idx, group.size()
        )
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
        )
        sources = torch.arange(1, 1 + group.size())[:, None]
        is_right = bool((recv_x == sources).all()) and len(recv_x) == group.size()
        combined, _, _ = buffer.combine(recv_x, handle)
        is_right &= torch.equal(combined, x * group.size())
        return is_right, buffer.rank, buffer.group_size, buffer.group is comm


def test_a_communicator_in_place_of_a_group(pool: Pool) -> None:
    assert pool.run(round_over_comm) == [(True, rank, 4, True) for rank in range(4)]
