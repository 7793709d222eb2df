"""crossdock: expert-parallel dispatch and combine of Mixture-of-Experts tokens.

`Buffer` moves tokens to the ranks that own their experts and brings the outputs back.
`crossdock.autograd` has the same as differentiable operations, `crossdock.nn` a complete layer.
Importing does no work.
"""

from crossdock.buffer import Buffer, topk_idx_t
from crossdock.config import Config
from crossdock.errors import (
    BufferTooSmallError,
    ConfigError,
    CrossdockError,
    HandleError,
    MissingDependencyError,
    PeerRefusedError,
    PeerTimeoutError,
    RankMismatchError,
    ShapeError,
    StoreLostError,
    TransportError,
    UnsupportedError,
)
from crossdock.events import EventHandle, EventOverlap
from crossdock.formats import (
    BF16,
    FP8_BLOCK128,
    FP8_ROUND_SCALE,
    FP8_UE8M0,
    INT8_ROW,
    ScaleRule,
    TokenFormat,
)
from crossdock.handle import Handle, LowLatencyHandle

__version__ = "0.1.0"

__all__ = [
    "BF16",
    "FP8_BLOCK128",
    "FP8_ROUND_SCALE",
    "FP8_UE8M0",
    "INT8_ROW",
    "Buffer",
    "BufferTooSmallError",
    "Config",
    "ConfigError",
    "CrossdockError",
    "EventHandle",
    "EventOverlap",
    "Handle",
    "HandleError",
    "LowLatencyHandle",
    "MissingDependencyError",
    "PeerRefusedError",
    "PeerTimeoutError",
    "RankMismatchError",
    "ScaleRule",
    "ShapeError",
    "StoreLostError",
    "TokenFormat",
    "TransportError",
    "UnsupportedError",
    "__version__",
    "topk_idx_t",
]
