"""Low-latency calls of a `Buffer` that leave rows where they land.

As in `buffer` each method checks shapes and dtypes, hands over, and dresses the result as a tuple.

T tokens here, K top-k, H hidden, R ranks, E experts, M slots for the tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from crossdock.decoding import DecodingCalls
from crossdock.errors import ConfigError
from crossdock.events import EventOverlap
from crossdock.low_latency_arguments import selected
from crossdock.shapes import meta
from crossdock.transports.header import Operation
from crossdock.verbs import LowLatencyViews

__all__ = ["DecodingViews"]

_Hook = Callable[[], None]


class DecodingViews(DecodingCalls):
    """Views of low-latency rows, for a `Buffer`, which is made of this and of what it adds."""

    def low_latency_dispatch_views(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        *,
        num_experts: int,
        topk_weights: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[LowLatencyViews, EventOverlap, _Hook | None]:
        """Send every token as `low_latency_dispatch` does, and get the rows where they land.

        Nothing is laid out by expert: a row comes once, with what its token chose here. For experts
        that take rows in any order, and add up themselves what they have for a token.

        Args:
            x: as for `low_latency_dispatch`; so are all others.
            topk_idx: [T, K] int64 expert ids, -1 for none.
            num_max_dispatch_tokens_per_rank: M, at least T; the same on all ranks.
            num_experts: E, a multiple of R.
            topk_weights: [T, K] float32, to be returned with the rows; or None. Given on all ranks
                or on none.
            dispatch_wait_recv_cost_stats: [R] int64, or [R, R].
            use_fp8: encode rows in the buffer's `low_latency_format`.
            round_scale: fp8 scales are powers of two.
            use_ue8m0: and are packed exponents.
            async_finish: return an event instead of waiting.
            return_recv_hook: only send; the returned `hook()` receives.

        Returns:
            `(views, event, hook)`. What the experts make of row `[s, t]`, added up over the experts
            of this rank, goes to `low_latency_combine_views` as [R, M, H].

        Collective, Sync: as `low_latency_dispatch`.
        Lifetime: `views.tokens` until this rank's next low-latency dispatch after they were
        received, on devices in the order of the stream, or until the buffer grows or is destroyed;
        the rest is the caller's. Where rows are moved by the host, all of it is the caller's.

        Raises: as `low_latency_dispatch`.
        """
        waits = dispatch_wait_recv_cost_stats
        with self._session.checking(Operation.LOW_LATENCY_DISPATCH):
            kind = self._kinds.dispatch(
                (
                    meta(x),
                    meta(topk_idx),
                    meta(topk_weights),
                    meta(waits),
                    None,
                    num_max_dispatch_tokens_per_rank,
                    num_experts,
                    use_fp8,
                    round_scale,
                    use_ue8m0,
                    True,
                )
            )
            selection = selected(topk_idx, topk_weights, num_experts)
            stats = self._stats("dispatch_wait_recv_cost_stats", waits)
        with self._turn(None, async_finish) as turn:
            views, receive = self._low_latency.dispatch_views(
                x, selection, kind, stats=stats, hooked=return_recv_hook
            )
            event = turn.event(x, *selection, *stats, *views[1:4])
        return views, event, receive if return_recv_hook else None

    def low_latency_combine_views(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        views: LowLatencyViews,
        *,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, _Hook | None]:
        """Sum what the ranks have for every token, unweighted.

        Args:
            x: [R, M, H] bf16: for each row of the views what this rank's experts made of it, added
                up. Slots without a row are not read.
            topk_idx: [T, K] int64, as dispatched; `CROSSDOCK_DEBUG=1` checks it.
            views: of the dispatch.
            zero_copy: `x` was written to `get_next_low_latency_views_buffer(views)`, and is read
                from there, by the other ranks too where they can. The same on all ranks; not with
                `return_recv_hook`.
            async_finish: return an event instead of waiting.
            return_recv_hook: only send; the returned `hook()` receives.
            out: [T, H] bf16 to write the result to; or None.
            combine_wait_recv_cost_stats: [R] int64, or [R, R]; or None.

        Returns:
            `(combined_x [T, H] bf16, event, hook)`: rounded to the buffer's `partials`, rows are
            added in float32, by ascending rank, and rounded once.

        Collective, Sync: as `low_latency_dispatch`. Lifetime: the result is the caller's.

        Raises: as `low_latency_combine`.
        """
        waits = combine_wait_recv_cost_stats
        with self._session.checking(Operation.LOW_LATENCY_COMBINE):
            if zero_copy and return_recv_hook:
                raise ConfigError("zero_copy: rows that others read cannot wait for a hook")
            if zero_copy:
                x = self._low_latency.views_buffer(views, x.shape[-1], make=False)
            kind = self._kinds.combine_views(
                (
                    meta(x),
                    meta(topk_idx),
                    meta(out),
                    meta(waits),
                    meta(views.src_idx),
                    views.num_experts,
                    zero_copy,
                )
            )
            selection = selected(topk_idx, None, kind.num_experts)
            stats = self._stats("combine_wait_recv_cost_stats", waits)
            if out is None:
                out = x.new_empty((kind.num_tokens, kind.hidden))
        with self._turn(None, async_finish) as turn:
            receive = self._low_latency.combine_views(
                x,
                selection,
                views,
                kind=kind,
                out=out,
                stats=stats,
                hooked=return_recv_hook,
            )
            event = turn.event(x, out, *selection, *stats, views.src_idx)
        return out, event, receive if return_recv_hook else None

    def get_next_low_latency_views_buffer(
        self, views: LowLatencyViews, hidden: int
    ) -> torch.Tensor:
        """Where to write what goes back for the next combine, with `zero_copy=True`.

        Other ranks may read there until a dispatch has been received that was made after their
        combine: between two combines of this kind there has to be one, also in graphs.

        Args:
            views: of a dispatch.
            hidden: H.

        Returns:
            [R, M, H] bf16.

        Collective: no. Sync: no.
        Lifetime: until this rank's next low-latency combine, or until the buffer grows or is
        destroyed.

        Raises:
            HandleError: the views are not some that this buffer returned, as far as can be seen; on
                devices, other ranks may still read there, or a combine there waits for its hook.
        """
        return self._low_latency.views_buffer(views, hidden, make=True)
