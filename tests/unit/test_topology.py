"""Who is in a group, without one."""

from __future__ import annotations

import pytest

from crossdock.errors import ConfigError
from crossdock.topology import Topology
from crossdock.transports.loopback import run_threads


def test_alone_without_a_group() -> None:
    topology = Topology.discover()
    assert (topology.rank, topology.num_ranks, topology.scale_up_ranks) == (0, 1, (0,))
    assert topology.allgather("x") == ["x"]


def test_threads_share_a_host() -> None:
    found = run_threads(3, lambda comm: Topology.discover(comm=comm))
    assert [one.rank for one in found] == [0, 1, 2]
    assert all(one.scale_up_ranks == (0, 1, 2) for one in found)


def test_hosts_decide_not_rank_numbers() -> None:
    topology = Topology(2, 4, ("a", "b", "a", "b"), ("x86_64",) * 4, lambda value: [value])
    assert topology.scale_up_ranks == (0, 2)


def test_group_and_comm_are_alternatives() -> None:
    comm = run_threads(1, lambda comm: comm)[0]
    with pytest.raises(ConfigError):
        Topology.discover(group=object(), comm=comm)
