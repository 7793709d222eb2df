"""How rows travel, and the choice among the ways.

`select` takes the first transport that covers the group and says why the others did not; asked for
one by name it never falls back. Names of transports occur nowhere above this floor.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from crossdock import _env
from crossdock.errors import TransportError, UnsupportedError
from crossdock.topology import Topology
from crossdock.transports.base import Carrier
from crossdock.transports.collective import Collective
from crossdock.transports.loopback import Loopback
from crossdock.transports.one_sided import OneSided
from crossdock.transports.symmetric import Symmetric
from crossdock.transports.zones import Capacity

__all__ = ["Limits", "select"]

_LOG = logging.getLogger("crossdock")
_MASK_BITS = 31
_NO_MASKS = "cannot do without a rank (enable_shrink)"
_ORDERED_STORES = ("x86_64", "AMD64")


@dataclass(frozen=True)
class Limits:
    """What a buffer may use and must be able to do.

    Attributes:
        zone_bytes: what to start with for high-throughput calls; 0 to wait for the first one.
        landing_bytes: the same for low-latency calls.
        max_bytes: what it must not exceed; 0 for no limit.
        can_shrink: whether low-latency calls go on without ranks that are late.
    """

    zone_bytes: int = 0
    landing_bytes: int = 0
    max_bytes: int = 0
    can_shrink: bool = False


def _device(topology: Topology, limits: Limits) -> Carrier:
    if len(topology.scale_up_ranks) < topology.num_ranks:
        raise TransportError("the ranks are not all on one host and in one pid namespace")
    if not topology.uses_cuda and not _env.interprets_kernels():
        raise TransportError("moves CUDA tensors, but the group's backend is not nccl")
    if importlib.util.find_spec("triton") is None:
        raise TransportError("needs Triton (pip install triton)")
    if limits.can_shrink and topology.num_ranks > _MASK_BITS:
        raise TransportError(f"enable_shrink: masks have {_MASK_BITS} bits")
    return Symmetric(topology, max_bytes=limits.max_bytes, can_shrink=limits.can_shrink)


def _one_sided(topology: Topology, limits: Limits) -> Carrier:
    if len(topology.scale_up_ranks) < topology.num_ranks:
        raise TransportError("the ranks are not all on one host and in one pid namespace")
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        raise TransportError("needs Linux")
    if any(machine not in _ORDERED_STORES for machine in topology.machines):
        raise TransportError(f"needs x86-64's store order, the ranks run {set(topology.machines)}")
    if topology.uses_cuda:
        raise TransportError("moves CPU tensors, but the group's backend is nccl")
    start = Capacity.of_bytes(topology.num_ranks, limits.zone_bytes, limits.landing_bytes)
    return OneSided(topology, start=start, max_bytes=limits.max_bytes, can_shrink=limits.can_shrink)


def _collective(topology: Topology, limits: Limits) -> Carrier:
    if limits.can_shrink:
        raise TransportError(_NO_MASKS)
    if topology.group is None:
        raise TransportError("needs a torch.distributed process group")
    return Collective(topology, topology.group)


def _loopback(topology: Topology, limits: Limits) -> Carrier:
    if limits.can_shrink:
        raise TransportError(_NO_MASKS)
    return Loopback(topology)


_CANDIDATES: tuple[tuple[str, Callable[[Topology, Limits], Carrier]], ...] = (
    ("device", _device),
    ("one_sided", _one_sided),
    ("collective", _collective),
)
_BY_NAME_ONLY = (("loopback", _loopback),)


def select(topology: Topology, limits: Limits, *, name: str | None = None) -> Carrier:
    """Open the best transport that covers the group, or the one asked for.

    Collective: all ranks, with the same arguments. Sync: waits for all ranks.

    Args:
        topology: the group.
        limits: memory to start with and not to exceed.
        name: "device", "one_sided", "collective" or "loopback"; None for the best that fits.

    Raises:
        UnsupportedError: none covers the group, or the named one does not; with the reasons.
            Raised on every rank.
    """
    everyone = dict(_CANDIDATES + _BY_NAME_ONLY)
    if name is not None and name not in everyone:
        raise UnsupportedError(f"no transport {name!r}; there are {', '.join(sorted(everyone))}")
    names = [name] if name is not None else [candidate for candidate, _ in _CANDIDATES]
    reasons: dict[str, str] = {}
    for candidate in names:
        try:
            transport = everyone[candidate](topology, limits)
        except TransportError as error:
            reasons[candidate] = str(error)
            continue
        if topology.rank == 0:
            _LOG.info("transport %s; not taken: %s", candidate, reasons or "none tried before")
        return transport
    raise UnsupportedError("no transport covers this group", reasons)
