"""What callers may pass to low-latency calls, whose checks must not take long.

What follows from shapes, dtypes and numbers alone is looked at once for all calls that have the
same; what is in a tensor is looked at every time, and on CPU only, where that is free.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from crossdock.errors import ConfigError, HandleError, ShapeError
from crossdock.formats import (
    BF16,
    FP8_BLOCK128,
    FP8_ROUND_SCALE,
    FP8_UE8M0,
    INT8_ROW,
    TokenFormat,
)
from crossdock.handle import LowLatencyHandle, check_slab_shapes
from crossdock.routing import Selection, check_expert_ids
from crossdock.shapes import Meta, check_meta
from crossdock.topology import num_local_experts
from crossdock.verbs import CombineKind, DispatchKind

__all__ = [
    "Kinds",
    "LowLatencyOptions",
    "check_row_count",
    "selected",
]

_REMEMBERED = 1024
"""Kinds of calls whose checks are remembered."""


@dataclass(frozen=True)
class LowLatencyOptions:
    """What a buffer was told of its low-latency calls, as it came.

    Attributes:
        form: "fp8", "int8", "bf16" or a format record: what `use_fp8=True` means.
        rows: "slab" or "compact".
        partials: "bf16" or "fp32", dtype of the sums that travel back.
    """

    form: str | TokenFormat = "fp8"
    rows: str = "slab"
    partials: str = "bf16"

    def check(self) -> None:
        """Raise `ConfigError` unless all are known."""
        choices = (
            ("low_latency_format", self.form, tuple(_FORMATS)),
            ("low_latency_rows", self.rows, ("slab", "compact")),
            ("partials", self.partials, tuple(_PARTIALS)),
        )
        for name, value, known in choices:
            if not isinstance(value, TokenFormat) and value not in known:
                raise ConfigError(f"{name} is {value!r}, must be one of {', '.join(known)}")

    @property
    def partials_dtype(self) -> torch.dtype:
        """Dtype of the sums that travel back."""
        return _PARTIALS[self.partials]

    def chosen(self, *, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> TokenFormat:
        """The format of a call; without `use_fp8` the other switches say nothing.

        Raises:
            ConfigError: switches that do not go together, or with the buffer's format.
        """
        if not use_fp8:
            return BF16
        if use_ue8m0 and not round_scale:
            raise ConfigError("use_ue8m0 needs round_scale=True: its scales are powers of two")
        form = self.form if isinstance(self.form, TokenFormat) else _FORMATS[self.form]
        if not round_scale:
            return form
        if form != FP8_BLOCK128:
            raise ConfigError(f"round_scale and use_ue8m0 are of fp8, the format is {form.name}")
        return FP8_UE8M0 if use_ue8m0 else FP8_ROUND_SCALE


class SlabArguments(NamedTuple):
    """The arguments of a dispatch, but for what is in its tensors."""

    x: Meta
    topk_idx: Meta
    topk_weights: Meta
    waits: Meta
    received: Meta
    num_slots: int
    num_experts: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool
    viewed: bool = False


class CombineArguments(NamedTuple):
    """The arguments of a combine, but for what is in its tensors.

    `src_info`, `layout_range` and what follows are those of its handle.
    """

    x: Meta
    topk_idx: Meta
    topk_weights: Meta
    out: Meta
    waits: Meta
    use_logfmt: bool
    src_info: Meta
    layout_range: torch.Size
    num_slots: int
    hidden: int
    num_experts: int


class ViewArguments(NamedTuple):
    """The arguments of a combine of views, but for what is in its tensors."""

    x: Meta
    topk_idx: Meta
    out: Meta
    waits: Meta
    src_idx: Meta
    num_experts: int
    zero_copy: bool


class Kinds:
    """The kinds of calls that a buffer makes: what is to be known of them is found out once.

    Args:
        options: what the buffer was told.
        num_ranks: R.
    """

    def __init__(self, options: LowLatencyOptions, num_ranks: int) -> None:
        self._options, self._num_ranks = options, num_ranks
        self.dispatch = functools.lru_cache(_REMEMBERED)(self._dispatch)
        self.combine = functools.lru_cache(_REMEMBERED)(self._combine)
        self.combine_views = functools.lru_cache(_REMEMBERED)(self._combine_views)

    def _dispatch(self, arguments: tuple[Any, ...]) -> DispatchKind:
        """The kind of a dispatch.

        Args:
            arguments: a `SlabArguments`, or a tuple that is quicker made.

        Raises:
            ConfigError: see `LowLatencyOptions.chosen`.
            ShapeError: see `check_dispatch`.
        """
        call = SlabArguments(*arguments)
        form = self._options.chosen(
            use_fp8=call.use_fp8, round_scale=call.round_scale, use_ue8m0=call.use_ue8m0
        )
        num_tokens, hidden, num_topk = check_dispatch(call, form, num_ranks=self._num_ranks)
        return DispatchKind(
            form=form,
            num_tokens=num_tokens,
            hidden=hidden,
            num_topk=num_topk,
            num_slots=call.num_slots,
            num_experts=call.num_experts,
            compact=self._options.rows == "compact" and not call.viewed,
            x=call.x,
            topk_idx=call.topk_idx,
            topk_weights=call.topk_weights,
            waits=call.waits,
            received=call.received,
            viewed=call.viewed,
        )

    def _combine(self, arguments: tuple[Any, ...]) -> CombineKind:
        """The kind of a combine.

        Args:
            arguments: a `CombineArguments`, or a tuple that is quicker made.

        Raises:
            ShapeError, HandleError: see `check_combine`.
        """
        call = CombineArguments(*arguments)
        num_tokens, num_topk = check_combine(call, num_ranks=self._num_ranks)
        src_info = _shape(call.src_info)
        return CombineKind(
            num_tokens=num_tokens,
            hidden=call.hidden,
            num_topk=num_topk,
            num_slots=call.num_slots,
            num_experts=call.num_experts,
            num_rows=src_info.numel(),
            compact=len(src_info) == 1,
            x_is_compact=len(_shape(call.x)) == 2,
            use_logfmt=call.use_logfmt,
            x=call.x,
            topk_idx=call.topk_idx,
            topk_weights=call.topk_weights,
            out=call.out,
            waits=call.waits,
            src_info=call.src_info,
        )

    def _combine_views(self, arguments: tuple[Any, ...]) -> CombineKind:
        """The kind of a combine of views.

        Args:
            arguments: a `ViewArguments`, or a tuple that is quicker made.

        Raises:
            ShapeError: a tensor has the wrong shape or dtype.
            HandleError: the views are of a group of another size.
        """
        call = ViewArguments(*arguments)
        check_meta("src_idx", call.src_idx, dtype=torch.int32, shape=(None, None))
        num_ranks, num_slots = _shape(call.src_idx)
        if num_ranks != self._num_ranks:
            raise HandleError(f"the views are of {num_ranks} ranks, this buffer has others")
        check_meta("x", call.x, dtype=torch.bfloat16, shape=(num_ranks, num_slots, None))
        hidden = _shape(call.x)[2]
        check_meta("topk_idx", call.topk_idx, dtype=torch.int64, shape=(None, None))
        num_tokens, num_topk = _shape(call.topk_idx)
        if num_tokens > num_slots:
            raise ShapeError("topk_idx", got=num_tokens, expected=f"{num_slots} tokens at most")
        if call.out is not None:
            check_meta("out", call.out, dtype=torch.bfloat16, shape=(num_tokens, hidden))
        return CombineKind(
            num_tokens=num_tokens,
            hidden=hidden,
            num_topk=num_topk,
            num_slots=num_slots,
            num_experts=call.num_experts,
            num_rows=num_ranks * num_slots,
            compact=False,
            x_is_compact=False,
            use_logfmt=False,
            x=call.x,
            topk_idx=call.topk_idx,
            topk_weights=None,
            out=call.out,
            waits=call.waits,
            src_info=call.src_idx,
            viewed=True,
            pulls=call.zero_copy,
        )


def check_dispatch(
    call: SlabArguments, form: TokenFormat, *, num_ranks: int
) -> tuple[int, int, int]:
    """Check the arguments of a dispatch.

    Returns:
        T, H and K.

    Raises:
        ShapeError: a tensor has the wrong shape or dtype, there are more tokens than slots, or the
            experts do not divide over the ranks.
    """
    check_meta("x", call.x, dtype=torch.bfloat16, shape=(None, None))
    num_tokens, hidden = _shape(call.x)
    form.row(hidden)
    _check_choices(call, num_tokens, num_ranks)
    if call.received is not None:
        name, shape = "cumulative_local_expert_recv_stats", (call.num_experts // num_ranks,)
        check_meta(name, call.received, dtype=torch.int32, shape=shape)
    return num_tokens, hidden, _shape(call.topk_idx)[1]


def check_combine(call: CombineArguments, *, num_ranks: int) -> tuple[int, int]:
    """Check the arguments of a combine.

    Returns:
        T and K.

    Raises:
        ShapeError: as `check_dispatch`.
        HandleError: the parts of the handle do not fit each other, or the group.
    """
    check_slab_shapes(
        _shape(call.src_info),
        call.layout_range,
        num_slots=call.num_slots,
        num_experts=call.num_experts,
        num_ranks=num_ranks,
    )
    check_meta("topk_weights", call.topk_weights, dtype=torch.float32, shape=(None, None))
    num_tokens = 0 if call.topk_idx is None else call.topk_idx[1][0]
    _check_choices(call, num_tokens, num_ranks)
    slab = (call.layout_range[0], num_ranks * call.num_slots, call.hidden)
    is_slab = call.x is not None and len(call.x[1]) == len(slab)
    check_meta("x", call.x, dtype=torch.bfloat16, shape=slab if is_slab else (None, call.hidden))
    if call.out is not None:
        check_meta("out", call.out, dtype=torch.bfloat16, shape=(num_tokens, call.hidden))
    return num_tokens, _shape(call.topk_idx)[1]


def _shape(value: Meta) -> torch.Size:
    """The shape of a tensor that is known to be there."""
    return torch.Size() if value is None else value[1]


def _check_choices(call: SlabArguments | CombineArguments, num_tokens: int, num_ranks: int) -> None:
    num_local_experts(call.num_experts, num_ranks)
    check_meta("topk_idx", call.topk_idx, dtype=torch.int64, shape=(num_tokens, None))
    if call.num_slots < max(num_tokens, 1):
        expected = f"at least {max(num_tokens, 1)}, the number of tokens"
        raise ShapeError("num_max_dispatch_tokens_per_rank", got=call.num_slots, expected=expected)
    if call.topk_weights is not None and call.topk_idx is not None:
        shape = tuple(call.topk_idx[1])
        check_meta("topk_weights", call.topk_weights, dtype=torch.float32, shape=shape)


def selected(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, num_experts: int
) -> Selection:
    """The choices of a rank's tokens.

    Raises:
        ShapeError: there is no such expert; on CPU.
    """
    check_expert_ids(topk_idx, num_experts)
    weights = None if topk_weights is None else topk_weights.contiguous()
    return Selection(topk_idx.contiguous(), weights)


def check_row_count(x: torch.Tensor, handle: LowLatencyHandle) -> None:
    """Raise `ShapeError` if compact rows are fewer than were received; on CPU."""
    if x.is_cpu and x.dim() == 2:
        needed = int(handle.packed_recv_count.sum())
        if x.shape[0] < needed:
            got = f"{x.shape[0]} rows"
            raise ShapeError("x", got=got, expected=f"{needed} rows or more, as were received")


_FORMATS = MappingProxyType({"fp8": FP8_BLOCK128, "int8": INT8_ROW, "bf16": BF16})
_PARTIALS = MappingProxyType({"bf16": torch.bfloat16, "fp32": torch.float32})
