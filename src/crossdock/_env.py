"""The only reader of the process environment.

Each variable is read when it is needed, never at import, and never written, but for a new process
that is forked from an older one. Arguments given in code win over variables; `docs/environment.md`
lists the same table (a test compares the two).
"""

from __future__ import annotations

import os
from types import MappingProxyType
from typing import NamedTuple

from crossdock.errors import ConfigError

__all__ = [
    "VARIABLES",
    "Variable",
    "debug",
    "first_call_timeout_s",
    "interprets_kernels",
    "marks_launches",
    "snapshot",
    "take_over",
    "timeout_s",
    "transport",
]


class Variable(NamedTuple):
    """One environment variable: its name, its default as text, what it means."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "CROSSDOCK_DEBUG",
        "0",
        "1: check that is_token_in_rank, and combine, agree with topk_idx; on a device, for "
        "buffers made while it is set on all ranks: rows travel with sums that are checked where "
        "they come, and Buffer.check() looks whether something was written beyond its place",
    ),
    Variable(
        "CROSSDOCK_FIRST_CALL_TIMEOUT_S",
        "600",
        "seconds a rank waits in the first call of each operation of a buffer; 0: for ever",
    ),
    Variable(
        "CROSSDOCK_NVTX",
        "0",
        "1: an NVTX range around every launch of a kernel, with its name, and whether it sends or "
        "receives where a hook parts the two",
    ),
    Variable(
        "CROSSDOCK_TIMEOUT_S",
        "60",
        "seconds a rank waits for its peers in every later call; 0: for ever",
    ),
    Variable("CROSSDOCK_TRANSPORT", "", "transport to take instead of the best that fits"),
    Variable(
        "TRITON_INTERPRET",
        "0",
        "1, set before Triton is imported: the device transport runs its kernels in Triton's "
        "interpreter, on CPU tensors; for tests",
    ),
)


_DEFAULTS = MappingProxyType({variable.name: variable.default for variable in VARIABLES})


def _read(name: str) -> str:
    return os.environ.get(name, _DEFAULTS[name])


def _seconds(name: str) -> float:
    text = _read(name)
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, must be a number of seconds") from error


def debug() -> bool:
    """Whether expensive consistency checks are on."""
    return _read("CROSSDOCK_DEBUG") not in ("", "0")


def marks_launches() -> bool:
    """Whether every launch of a kernel is an NVTX range."""
    return _read("CROSSDOCK_NVTX") not in ("", "0")


def timeout_s() -> float:
    """Steady-state deadline of a wait, in seconds (0: none)."""
    return _seconds("CROSSDOCK_TIMEOUT_S")


def first_call_timeout_s() -> float:
    """Deadline of a wait in the first use of an operation, in seconds (0: none)."""
    return _seconds("CROSSDOCK_FIRST_CALL_TIMEOUT_S")


def transport() -> str | None:
    """Name of the transport to use, or None to choose."""
    return _read("CROSSDOCK_TRANSPORT") or None


def interprets_kernels() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return _read("TRITON_INTERPRET") not in ("", "0")


def snapshot() -> dict[str, str]:
    """The whole environment, for `take_over`."""
    return dict(os.environ)


def take_over(environment: dict[str, str]) -> None:
    """Give this process, forked from one that started earlier, the environment of its parent."""
    os.environ.clear()
    os.environ.update(environment)
