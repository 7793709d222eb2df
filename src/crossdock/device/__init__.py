"""The calls of a buffer whose rows are moved by kernels; the host only launches them."""

from __future__ import annotations

import torch

from crossdock.device.engine import Engine
from crossdock.device.exchange import DeviceExchange
from crossdock.device.low_latency import DeviceLowLatency
from crossdock.transports.session import Session
from crossdock.transports.symmetric import Symmetric

__all__ = ["device_verbs"]


def device_verbs(
    transport: Symmetric, session: Session, *, partials: torch.dtype, reserve: int
) -> tuple[DeviceExchange, DeviceLowLatency]:
    """The verbs of one buffer over memory that kernels address."""
    engine = Engine(transport, session)
    exchange = DeviceExchange(engine, reserve_tokens=reserve)
    return exchange, DeviceLowLatency(engine, partials=partials)
