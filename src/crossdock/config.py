"""Tuning knobs, and the size of a buffer as arithmetic.

`Config` has DeepEP's names because clients construct it by position. On CPU the knobs change
nothing; the size hints say with how much memory a buffer should start.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from crossdock.errors import ConfigError

__all__ = ["NUM_LANDING_ZONES", "NUM_ZONES", "Config", "align", "low_latency_size_hint"]

NUM_ZONES = 4
"""Equal zones of a one-sided buffer for packed rows: see `transports.zones`."""

NUM_LANDING_ZONES = 4
"""Equal zones for low-latency calls: two dispatches and two combines may be in flight."""

_ROUTING_BYTES_PER_TOKEN = 256
_MAX_TOPK = 32
_MAY_BE_ZERO = ("num_send_sms", "tile_bytes")
_SCALE_UP_LIMIT = 8


def align(size: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Config:
    """Knobs of one operation.

    Args:
        num_sms: streaming multiprocessors a GPU operation may use.
        num_max_nvl_chunked_send_tokens: tokens sent at once inside the scale-up domain.
        num_max_nvl_chunked_recv_tokens: tokens in flight inside the scale-up domain; also the
            token count that `get_nvl_buffer_size_hint` assumes.
        num_max_rdma_chunked_send_tokens: tokens sent at once between scale-up domains.
        num_max_rdma_chunked_recv_tokens: tokens in flight between scale-up domains.
        num_send_sms: of `num_sms` those that send, while the others place or add up; 0 for what
            does well in general.
        tile_bytes: bytes that one of them moves at a time; 0 as well.

    Raises:
        ConfigError: a knob is not positive, or a send chunk does not fit its receive window.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256
    num_send_sms: int = field(default=0, kw_only=True)
    tile_bytes: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in _MAY_BE_ZERO else 1
            if value < least:
                kind = "positive" if least else "0 or more"
                raise ConfigError(f"Config: {name} is {value}, must be {kind}")
        if self.num_send_sms >= self.num_sms > 1:
            raise ConfigError(
                f"Config: num_send_sms is {self.num_send_sms}, must leave some of "
                f"num_sms={self.num_sms} to receive"
            )
        self._check_chunk("nvl", limit=self.num_max_nvl_chunked_recv_tokens - 1)
        self._check_chunk("rdma", limit=self.num_max_rdma_chunked_recv_tokens // 2)

    def _check_chunk(self, domain: str, *, limit: int) -> None:
        name = f"num_max_{domain}_chunked_send_tokens"
        if getattr(self, name) > limit:
            raise ConfigError(
                f"Config: {name} is {getattr(self, name)}, at most {limit} with "
                f"num_max_{domain}_chunked_recv_tokens="
                f"{getattr(self, f'num_max_{domain}_chunked_recv_tokens')}"
            )

    @classmethod
    def load(cls, path: str | Path, operation: str) -> Config:
        """The knobs that `crossdock tune` found best, and wrote to a file.

        Args:
            path: of the file.
            operation: "dispatch" or "combine".

        Raises:
            ConfigError: the file is not one of `crossdock tune`.
        """
        try:
            best = json.loads(Path(path).read_text(encoding="utf-8"))["best"][operation]
            return cls(**best)
        except (OSError, ValueError, LookupError, TypeError) as error:
            text = f"{path} has no knobs for {operation!r}: {error}"
            raise ConfigError(text) from error

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to start a buffer with: room for the chunk window from every rank.

        A buffer grows when calls need more, so this is a starting size, not a limit.

        Args:
            hidden_bytes: bytes of the widest row that will be sent.
            num_ranks: ranks of the group.
        """
        tokens = self.num_max_nvl_chunked_recv_tokens * min(num_ranks, _SCALE_UP_LIMIT)
        return align(tokens * (NUM_ZONES * hidden_bytes + _ROUTING_BYTES_PER_TOKEN), 4096)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for traffic between scale-up domains; 0 up to eight ranks, as clients expect.

        Args:
            hidden_bytes: bytes of the widest row that will be sent.
            num_ranks: ranks of the group.
        """
        if num_ranks <= _SCALE_UP_LIMIT:
            return 0
        domains = -(-num_ranks // _SCALE_UP_LIMIT)
        return align(2 * domains * self.num_max_rdma_chunked_recv_tokens * hidden_bytes, 4096)


def low_latency_size_hint(num_slots: int, hidden: int, num_ranks: int) -> int:
    """Bytes of a buffer for low-latency calls: every call in flight has a row for each token.

    That is `4 * R * M * 2H` (bf16 rows come back), and a sixteenth of the whole for routing, at
    least for top-32.

    Args:
        num_slots: M, tokens of a rank at most.
        hidden: H.
        num_ranks: R.
    """
    rows = NUM_LANDING_ZONES * align(num_slots * 2 * hidden + 4096, 4096) * 16 // 15
    shares = 16 * 2 * align(num_slots * _MAX_TOPK * 8, 64)
    return align(num_ranks * max(rows, shares) + 16, 4096)
