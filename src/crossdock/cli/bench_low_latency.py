"""The low-latency calls as a case of the benchmark, with those who contend in it.

The library is called as DeepEP's interface is: dispatch without weights, combine with them; once
waiting in each call, once with hooks, where both halves are timed by themselves. The baselines are
in `bench_low_latency_baseline.py`, the taking of turns in `bench_world.py`.

Letters: R ranks, E experts, L experts of a rank, T tokens of a rank, K choices a token, H hidden,
M slots for the tokens of a rank (here T), P rows of all experts of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock import Buffer, ConfigError, UnsupportedError, codec, formats
from crossdock import reference_low_latency as reference
from crossdock.cli.bench_low_latency_baseline import GlooSlabs, Slabs, TunedGlooSlabs
from crossdock.cli.bench_world import Case, Contender, Contenders, Expected, Inputs

__all__ = ["CONTENDERS", "FORMATS", "LowLatency", "result_bytes", "slot_buffer_bytes"]

FORMATS = MappingProxyType(
    {"fp8": formats.FP8_BLOCK128, "bf16": formats.BF16, "int8": formats.INT8_ROW}
)

_BACK_BYTES = torch.bfloat16.itemsize  # of an element on the way back


@dataclass(frozen=True, kw_only=True)
class LowLatency(Case):
    """`low_latency_dispatch` and `low_latency_combine`, into slabs.

    Raises:
        ConfigError: the numbers do not go together, or there is no such format.
        ShapeError: the format cannot encode tokens of this width.
    """

    num_tokens: int = 128
    hidden: int = 7168
    num_experts: int = 256
    form: str = "fp8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMATS:
            raise ConfigError(f"format is {self.form!r}, must be one of {', '.join(FORMATS)}")
        if self.hidden % 4:
            raise ConfigError(f"hidden is {self.hidden}: the baselines need a multiple of 4")
        FORMATS[self.form].row(self.hidden)

    @property
    def contenders(self) -> Contenders:
        """See `Case`."""
        return CONTENDERS

    @property
    def combine_bound(self) -> float:
        """See `Case`; sums are rounded to bf16 where they leave, and again where they arrive."""
        return 1e-5

    @property
    def round_trip_bytes(self) -> int:
        """See `Case`."""
        return FORMATS[self.form].row(self.hidden).row_bytes + self.hidden * _BACK_BYTES

    @property
    def num_local(self) -> int:
        """L."""
        return self.num_experts // self.num_ranks

    def sizes(self) -> dict[str, int]:
        """See `Case`."""
        return {
            "slots": slot_buffer_bytes(self),
            "slabs": result_bytes(self, compact=False),
            "compact": result_bytes(self, compact=True),
        }

    def make_inputs(self, rank: int) -> Inputs:
        """See `Case`."""
        return self.drawn(rank, torch.bfloat16)

    def moved(self, received: Slabs) -> dict[str, Tensor]:
        """See `Case`; of slabs only the rows that are defined."""
        payload, scales = _defined_rows(received)
        moved = {"counts": received.recv_count, "rows": payload.view(torch.int32)}
        return moved if scales is None else {**moved, "scales": scales}

    def apply_experts(self, received: Slabs, rank: int) -> Tensor:
        """See `Case`; every expert of the world has another factor."""
        payload, scales = _defined_rows(received)
        rows = self._outputs(payload, scales, received.recv_count.tolist(), rank=rank)
        slabs = rows.new_empty(*received.payload.shape)
        slabs.view(-1, self.hidden)[_defined_slots(received)] = rows
        return slabs

    def _outputs(
        self, payload: Tensor, scales: Tensor | None, counts: Sequence[int], *, rank: int
    ) -> Tensor:
        """`[P, H]` bf16: what the experts of a rank make of their rows."""
        planes = [payload] if scales is None else [payload, scales]
        if self.form == "int8":
            planes[1] = planes[1].unsqueeze(1)
        numbers = torch.arange(self.num_local, dtype=torch.float32, device="cpu")
        factors = (numbers + (1 + rank * self.num_local)) / self.num_experts
        each = factors.repeat_interleave(torch.tensor(counts, device="cpu")).unsqueeze(1)
        return codec.decode(planes, FORMATS[self.form]).mul_(each).to(torch.bfloat16)

    def ask_oracle(self) -> list[Expected]:
        """See `Case`."""
        ranks = range(self.num_ranks)
        xs, idxs, weights = zip(*(self.make_inputs(rank) for rank in ranks), strict=True)
        slabs = reference.dispatch(xs, idxs, num_experts=self.num_experts, format=self.form)
        rows = [self._expert_rows(slabs[rank], rank) for rank in ranks]
        returned = reference.combine(rows, idxs, weights, num_experts=self.num_experts)
        return [
            Expected(_moved_rows(slabs[rank]), returned[rank].combined, self._arriving(idxs, rank))
            for rank in ranks
        ]

    def _expert_rows(self, slabs: reference.ReferenceSlabs, rank: int) -> list[Tensor]:
        """What the experts of a rank make of what the oracle gives them, expert by expert."""
        scales = None if slabs.scales is None else torch.cat(slabs.scales)
        rows = self._outputs(torch.cat(slabs.rows), scales, slabs.recv_count, rank=rank)
        return list(torch.split(rows, slabs.recv_count))

    def _arriving(self, topk_idxs: Sequence[Tensor], rank: int) -> list[int]:
        """Tokens of each rank that chose an expert of this one."""
        return [int((idx // self.num_local == rank).any(dim=1).sum()) for idx in topk_idxs]


def _defined_slots(received: Slabs) -> Tensor:
    """`[P]` int64, the slots of the slabs that hold a row."""
    places = torch.arange(received.payload.size(1), device=received.payload.device)
    return (places < received.recv_count.unsqueeze(1)).flatten().nonzero().squeeze(1)


def _defined_rows(received: Slabs) -> tuple[Tensor, Tensor | None]:
    """Payload `[P, H]`, and scales `[P, ...]` if there are."""
    slots = _defined_slots(received)
    slabs, slab_rows = received.payload, received.payload.size(1)
    rows = slabs.view(torch.uint8).flatten(0, 1).index_select(0, slots).view(slabs.dtype)
    if received.scales is None:
        return rows, None
    return rows, received.scales[slots // slab_rows, slots % slab_rows]


def _moved_rows(slabs: reference.ReferenceSlabs) -> dict[str, Tensor]:
    """The oracle's answer by the names of `moved`."""
    moved = {
        "counts": torch.tensor(slabs.recv_count, dtype=torch.int32, device="cpu"),
        "rows": torch.cat(slabs.rows).view(torch.int32),
    }
    return moved if slabs.scales is None else {**moved, "scales": torch.cat(slabs.scales)}


def slot_buffer_bytes(case: LowLatency) -> int:
    """Bytes of a buffer with a slot for each (expert, source, token), twice: DeepEP's scheme.

    There a sender writes a token's row into the slab of each of its experts, without asking who
    else writes there. So each of the L experts of a rank has a slot for every token of every rank:
    `L * R * M = E * M` rows. On the way back a rank receives a row from each expert of a token,
    whichever they are: a slot for each of its M tokens and E experts, `E * M` rows again. Either
    kind of call uses the same memory, as wide as the wider row (that of the way back is bf16), and
    there are two such buffers, since the rows of one call are read while the next one's arrive:
    `2 * E * M * max(row, 2 * H)`.

    Only where rows land is counted here, and no message header. Where senders need memory to send
    from, it is as much again.
    """
    widest = max(FORMATS[case.form].row(case.hidden).row_bytes, case.hidden * _BACK_BYTES)
    return 2 * case.num_experts * case.num_tokens * widest


def result_bytes(case: LowLatency, *, compact: bool) -> int:
    """Bytes of the payload and scales that one dispatch returns: slabs, or compact rows."""
    per_source = min(case.num_topk, case.num_local) if compact else case.num_local
    num_rows = per_source * case.num_ranks * case.num_tokens
    return num_rows * FORMATS[case.form].row(case.hidden).row_bytes


class CrossdockSlabs(Contender):
    """`Buffer` as a caller of DeepEP's interface uses it.

    Args:
        group: Every rank of the world.
        case: What is measured.
        use_hooks: Send in the calls, and receive in their hooks.
    """

    def __init__(
        self, group: dist.ProcessGroup, case: LowLatency, *, use_hooks: bool = False
    ) -> None:
        self.case, self.use_hooks = case, use_hooks
        sizes = (case.num_tokens, case.hidden, case.num_ranks, case.num_experts)
        self.buffer = Buffer(
            group,
            num_rdma_bytes=Buffer.get_low_latency_rdma_size_hint(*sizes),
            low_latency_mode=True,
            low_latency_format=case.form,
            transport=case.transport,
        )

    def __repr__(self) -> str:
        return repr(self.buffer)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Slabs:
        """Dispatch, without weights: combine is given them."""
        tokens, recv_count, handle, _, self.hook = self.buffer.low_latency_dispatch(
            x,
            topk_idx,
            self.case.num_tokens,
            self.case.num_experts,
            use_fp8=self.case.form != "bf16",
            return_recv_hook=self.use_hooks,
        )
        payload, scales = tokens if isinstance(tokens, tuple) else (tokens, None)
        return Slabs(payload, scales, recv_count, (topk_idx, topk_weights, handle))

    def combine(self, x: Tensor, route: Any) -> Tensor:
        """Combine, with weights."""
        topk_idx, topk_weights, handle = route
        combined, _, self.hook = self.buffer.low_latency_combine(
            x, topk_idx, topk_weights, handle, return_recv_hook=self.use_hooks
        )
        return combined

    def memory(self) -> dict[str, int]:
        """Where rows land, and what the buffer was told to begin with, routing included."""
        try:
            landing = self.buffer.get_local_buffer_tensor(torch.uint8).numel()
        except UnsupportedError:
            return {}
        return {"landing": landing, "begun_with": self.buffer.num_rdma_bytes}


def _hooked(group: dist.ProcessGroup, case: LowLatency) -> Contender:
    return CrossdockSlabs(group, case, use_hooks=True)


def _baseline(group: dist.ProcessGroup, case: LowLatency) -> Contender:
    return GlooSlabs(group, case.num_experts, num_slots=case.num_tokens, form=case.form)


def _tuned(group: dist.ProcessGroup, case: LowLatency) -> Contender:
    return TunedGlooSlabs(group, case.num_experts, num_slots=case.num_tokens, form=case.form)


CONTENDERS: Contenders = MappingProxyType(
    {
        "crossdock": CrossdockSlabs,
        "crossdock, hooks": _hooked,
        "gloo": _baseline,
        "gloo tuned": _tuned,
    }
)
