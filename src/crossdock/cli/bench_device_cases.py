"""What the benchmark on GPUs measures: its sizes, its chapters, and the figures it makes.

Everything here is arithmetic on the host, so that it can be read and tested without a GPU. Whoever
measures fills in `Figure`s (through `bench_device_stage.py`); whoever shows them reads them
(`bench_device_tables.py`, `bench_device_picture.py`).

Bandwidth: a row is one token's bytes on their way to one rank. "Logical" counts all rows that a
rank receives, its own among them; "wire" only those of other ranks. Both are means over the ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from crossdock import ConfigError, formats

__all__ = [
    "FORMS",
    "HIGH_THROUGHPUT",
    "HOOKED",
    "KNOWN",
    "LOW_LATENCY",
    "MODES",
    "PAIR",
    "Chapter",
    "Figure",
    "Kernel",
    "Report",
    "Samples",
    "Setup",
    "Traffic",
    "filled",
    "left_out",
    "plan",
    "quartiles",
    "row_bytes",
]

HIGH_THROUGHPUT, LOW_LATENCY = "high-throughput", "low-latency"
MODES = (HIGH_THROUGHPUT, LOW_LATENCY)
FORMS = ("fp8", "bf16")
DEFAULT_TOKENS = ((4096,), (1, 16, 64, 128, 512))
"""Of high throughput, of low latency."""
MOST_SLAB_TOKENS = 1024
"""Beyond these nobody asks for low latency, and slabs take tens of gigabytes."""
USUAL_SLOTS = 128
DEFAULT_SMS = (24, 128)
ORACLE_TOKENS = 16

PAIR = "dispatch + combine"
KNOWN, HOOKED = f"{PAIR}, weights at dispatch", f"{PAIR}, hooks"
"""Of low latency; dispatch is given no weights elsewhere, and calls wait in themselves."""

_FORMATS = MappingProxyType({"fp8": formats.FP8_BLOCK128, "bf16": formats.BF16})


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all measurements of a run share.

    Attributes:
        device: "cuda", a GPU for each rank; or "cpu", to rehearse: those figures mean nothing.
        budget_s: Seconds after which nothing more is begun.
        with_peers: Also measure other systems.
        with_kernels: Also say which kernels ran, and how long.

    Raises:
        ConfigError: the numbers do not go together.
    """

    device: str
    num_ranks: int
    hidden: int = 7168
    num_experts: int = 256
    num_topk: int = 8
    num_iters: int = 30
    transport: str | None = None
    budget_s: float = 240.0
    with_peers: bool = True
    with_kernels: bool = False

    def __post_init__(self) -> None:
        sizes = (self.num_ranks, self.hidden, self.num_topk, self.num_iters)
        if min(sizes) < 1 or self.budget_s <= 0:
            raise ConfigError("ranks, hidden, top-k, iterations and budget must be positive")
        if self.num_experts % self.num_ranks or self.num_topk > self.num_experts:
            raise ConfigError(
                f"{self.num_experts} experts: must be a multiple of the {self.num_ranks} ranks "
                f"and at least the top-k of {self.num_topk}"
            )
        if self.hidden % 128:
            raise ConfigError(f"hidden is {self.hidden}: fp8 rows need a multiple of 128")

    @property
    def num_local(self) -> int:
        """Experts of a rank."""
        return self.num_experts // self.num_ranks


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Measurements that the ranks make in one go, with memory of their own.

    A chapter that breaks takes no other one with it.

    Attributes:
        system: "crossdock", "NCCL", "FlashInfer"; "oracle", for results without times; "links".
        mode: One of `MODES`; empty where it does not matter.
        num_tokens: Tokens of a rank.
        forms: Of tokens in low-latency calls, some of `FORMS`.
        sms: The SM counts to measure high-throughput calls with.
    """

    setup: Setup
    system: str
    mode: str = ""
    num_tokens: int = 0
    forms: tuple[str, ...] = FORMS
    sms: tuple[int, ...] = DEFAULT_SMS

    @property
    def num_slots(self) -> int:
        """Slots for the tokens of a rank, as a server would keep them whatever the batch."""
        return max(USUAL_SLOTS, self.num_tokens)

    def __str__(self) -> str:
        tokens = f"{self.num_tokens} tokens" if self.num_tokens else ""
        return ", ".join(part for part in (self.system, self.mode, tokens) if part)


class Traffic(NamedTuple):
    """Rows that land on a rank in dispatch, the mean over the ranks: all, and other ranks'."""

    rows: float
    remote_rows: float


class Samples(NamedTuple):
    """What one rank measured of a call, repeat by repeat, in microseconds.

    Attributes:
        times_us: From the call until its result can be used.
        host_us: Until the call returned; empty where nobody looked.
    """

    times_us: list[float]
    host_us: list[float]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One call of one system, measured or not.

    Attributes:
        clock: "events", single calls with a cold cache; "graph", calls of a CUDA graph; "wall",
            calls one after the other, by the host's clock.
        time_us: Median over repeats of the slowest rank's time; None where it was not measured.
        host_us: The same for the time until the call returned.
        logical_bytes, wire_bytes: Moved by a call; 0 where nothing moves.
        num_sms: SMs that the system was told to use; None where it was told nothing.
        why: Why there is no time.
    """

    system: str
    mode: str
    call: str
    form: str
    num_tokens: int
    clock: str
    num_sms: int | None = None
    logical_bytes: float = 0.0
    wire_bytes: float = 0.0
    time_us: float | None = None
    quartiles_us: tuple[float, float] | None = None
    host_us: float | None = None
    why: str = ""

    @property
    def logical_gb_s(self) -> float | None:
        """Bandwidth by all rows received."""
        return _gb_s(self.logical_bytes, self.time_us)

    @property
    def wire_gb_s(self) -> float | None:
        """Bandwidth by the rows of other ranks."""
        return _gb_s(self.wire_bytes, self.time_us)

    @property
    def is_wrong(self) -> bool:
        """Whether it was refused for a result that differs from what it must be."""
        return self.why.startswith("wrong result")

    def copies_us(self, link_gb_s: float | None) -> float | None:
        """What copies between devices would take for the bytes of other ranks' rows."""
        return self.wire_bytes / link_gb_s / 1e3 if link_gb_s and self.wire_bytes else None


class Kernel(NamedTuple):
    """A kernel that one call of a figure ran on rank 0, and its time on the device."""

    figure: Figure
    name: str
    runs: float
    time_us: float


@dataclass
class Report:
    """What a chapter brought.

    Attributes:
        about: What -> what is to be said of it.
        memory: Chapter -> purpose -> bytes of a rank.
        link_gb_s: What copies from a rank to all others got through its links; None where nobody
            looked. No limit: kernels may get more.
        is_healthy: Whether the rank processes can go on.
    """

    figures: list[Figure] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    link_gb_s: float | None = None
    is_healthy: bool = True

    def add(self, other: Report) -> None:
        """Takes over what another chapter brought."""
        self.figures += other.figures
        self.kernels += other.kernels
        self.about |= other.about
        self.memory |= other.memory
        self.link_gb_s = other.link_gb_s or self.link_gb_s


def row_bytes(form: str, hidden: int) -> int:
    """Bytes of a row in a form of tokens, scales included.

    Raises:
        ConfigError: there is no such form here.
    """
    if form not in _FORMATS:
        raise ConfigError(f"format is {form!r}, must be one of {', '.join(FORMS)}")
    return _FORMATS[form].row(hidden).row_bytes


def filled(blank: Figure, ranks: Sequence[Samples]) -> Figure:
    """A figure with its times: of each repeat the slowest rank's, of those the median."""
    times = [max(each) for each in zip(*(samples.times_us for samples in ranks), strict=True)]
    host = [max(each) for each in zip(*(samples.host_us for samples in ranks), strict=True)]
    return replace(
        blank,
        time_us=statistics.median(times),
        quartiles_us=quartiles(times),
        host_us=statistics.median(host) if host else None,
    )


def plan(
    setup: Setup,
    *,
    modes: Sequence[str] = MODES,
    tokens: Sequence[int] | None = None,
    forms: Sequence[str] | None = None,
    sms: Sequence[int] | None = None,
) -> list[Chapter]:
    """Lists what to do, the most wanted first: what is left when the time is up is left out.

    Args:
        setup: What the run shares.
        modes: Some of `MODES`.
        tokens: Token counts; None for the usual ones of each mode.
        forms: Of tokens in low-latency calls; None for all.
        sms: SM counts of high-throughput calls; None for the usual ones.

    Raises:
        ConfigError: a format, SM count or token count that cannot be.
    """
    counts, forms = tuple(sms or DEFAULT_SMS), tuple(forms or FORMS)
    for form in forms:
        row_bytes(form, setup.hidden)
    if any(count <= 0 or count % 2 for count in counts) or min(tokens or (1,)) < 1:
        raise ConfigError("SM counts must be positive and even, token counts positive")
    base = Chapter(setup=setup, system="links", forms=forms, sms=counts)
    oracle = replace(base, system="oracle", num_tokens=ORACLE_TOKENS)
    cases = [
        replace(base, mode=mode, num_tokens=num_tokens)
        for mode in modes
        for num_tokens in _tokens_of(mode, tokens)
    ]
    systems = ("crossdock", "FlashInfer", "NCCL") if setup.with_peers else ("crossdock",)
    chapters = [base, *(replace(oracle, mode=mode) for mode in modes)]
    return chapters + [replace(case, system=system) for system in systems for case in cases]


def left_out(modes: Sequence[str], tokens: Sequence[int] | None) -> list[int]:
    """Token counts that were asked for and are too many for low-latency calls."""
    if LOW_LATENCY not in modes:
        return []
    return [num_tokens for num_tokens in tokens or () if num_tokens > MOST_SLAB_TOKENS]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value, itself."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _tokens_of(mode: str, tokens: Sequence[int] | None) -> Sequence[int]:
    if not tokens:
        return DEFAULT_TOKENS[MODES.index(mode)]
    if mode == HIGH_THROUGHPUT:
        return tokens
    return [num_tokens for num_tokens in tokens if num_tokens <= MOST_SLAB_TOKENS]


def _gb_s(nbytes: float, time_us: float | None) -> float | None:
    return nbytes / time_us / 1e3 if time_us and nbytes else None
