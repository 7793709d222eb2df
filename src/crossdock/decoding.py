"""The low-latency half of `Buffer`: DeepEP's names for decoding, and its masks.

As in `buffer` each method checks shapes and dtypes, hands over, and dresses the result as a tuple;
the calls themselves are in `low_latency`.

T tokens here, K top-k, H hidden, R ranks, E experts, L = E / R local experts,
M = `num_max_dispatch_tokens_per_rank`, A = M * R * min(K, L) compact rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from crossdock.arguments import checked_wait_stats
from crossdock.config import low_latency_size_hint
from crossdock.errors import ConfigError, ShapeError
from crossdock.events import HERE_AND_NOW, AnyEvent, EventOverlap, Turn
from crossdock.handle import LowLatencyHandle
from crossdock.low_latency_arguments import Kinds, check_row_count, selected
from crossdock.shapes import check_tensor, meta
from crossdock.topology import num_local_experts
from crossdock.transports.base import Masks
from crossdock.transports.header import Operation
from crossdock.transports.session import Session
from crossdock.verbs import NO_STATS, ExchangeCalls, LowLatencyCalls, Stats

__all__ = ["DecodingCalls"]

_SlabTokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_Hook = Callable[[], None]


class DecodingCalls:
    """The low-latency calls of a `Buffer`, which is made of this and of what it adds."""

    rank: int
    group_size: int
    transport: str
    _session: Session
    _exchange: ExchangeCalls
    _low_latency: LowLatencyCalls
    _kinds: Kinds
    _stream: torch.cuda.Stream | None

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to give as `num_rdma_bytes` to a buffer for low-latency calls of this size.

        The number of experts does not matter: a row crosses once per rank, not per expert. With
        `partials="fp32"` rows come back twice as wide: give twice as much. A buffer grows when
        this was too little, except while ranks are masked.

        Args:
            num_max_dispatch_tokens_per_rank: M.
            hidden: H.
            num_ranks: R.
            num_experts: E, a multiple of R.

        Raises:
            ShapeError: a size is not positive, or the experts do not divide over the ranks.
        """
        num_local_experts(num_experts, num_ranks)
        sizes = {"num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank}
        for name, size in {**sizes, "hidden": hidden}.items():
            if size < 1:
                raise ShapeError(name, got=size, expected="1 or more")
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: torch.Tensor | None = None,
    ) -> tuple[_SlabTokens, torch.Tensor, LowLatencyHandle, EventOverlap, _Hook | None]:
        """Send every token to its experts, and lay out what comes by expert.

        Args:
            x: [T, H] bf16.
            topk_idx: [T, K] int64 expert ids, -1 for none.
            num_max_dispatch_tokens_per_rank: M, at least T; the same on all ranks. Any number in
                any call.
            num_experts: E, a multiple of R.
            cumulative_local_expert_recv_stats: [L] int32; the rows received are added; or None.
            dispatch_wait_recv_cost_stats: [R] int64, or [R, R] with a row for each waiting rank;
                the microseconds that this rank waited for each source are added; or None.
            use_fp8: encode rows in the buffer's `low_latency_format`; otherwise they are bf16,
                moved bit for bit.
            round_scale: fp8 scales are powers of two.
            use_ue8m0: and are packed exponents; needs `round_scale`.
            async_finish: return an event instead of waiting.
            return_recv_hook: only send; the returned `hook()` receives.
            topk_weights: [T, K] float32, so that combine need not ask for them; or None. Given on
                all ranks or on none.

        Returns:
            `(recv_x, recv_count, handle, event, hook)`. Slabs: `recv_x` is [L, R * M, H], or with
            scales `(data, scales)`: float32 [L, R * M, H / 128] or, with `use_ue8m0`, int32
            [L, R * M, H / 512], the last two dimensions column-major; int8 [L, R * M]. Compact:
            [A, H], scales [A, ...], the rows of expert `i` from row `sum(recv_count[:i])`. Of an
            expert the first `recv_count[i]` rows are defined, by source rank, then token; one for
            each distinct (token, expert). `recv_count` is [L] int32; `hook` is None unless asked
            for. With a hook all tensors are complete once it has run.

        Collective: all ranks, in the same order as all calls of this buffer, also with T = 0.
        The hook is not: every rank runs its hooks when it likes, also between other calls, from
        any thread. Two dispatches and two combines may be in flight.
        Sync: waits for all ranks to come to the call; without a hook, until all rows are here.
        Lifetime: the results are the caller's.

        Raises:
            ShapeError, ConfigError: wrong arguments; the peers raise `PeerRefusedError`.
            HandleError: two dispatches are in flight already.
            RankMismatchError: the ranks make different calls, or differ in M, H, K, E or format.
            PeerTimeoutError: some ranks did not come, and the buffer may not shrink.
            BufferTooSmallError: `max_buffer_bytes` does not allow it, or the buffer has to grow
                while ranks are masked.
        """
        received, waits = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats
        try:
            kind = self._kinds.dispatch(
                (
                    meta(x),
                    meta(topk_idx),
                    meta(topk_weights),
                    meta(waits),
                    meta(received),
                    num_max_dispatch_tokens_per_rank,
                    num_experts,
                    use_fp8,
                    round_scale,
                    use_ue8m0,
                )
            )
            selection = selected(topk_idx, topk_weights, num_experts)
            stats = self._stats("dispatch_wait_recv_cost_stats", waits, received)
        except Exception as error:
            self._session.refuse(Operation.LOW_LATENCY_DISPATCH, error)
            raise
        with self._turn(None, async_finish) as turn:
            done = self._low_latency.dispatch(
                x, selection, kind, stats=stats, hooked=return_recv_hook
            )
            handle = done.handle
            made = (done.payload, done.scales, handle[0], handle[1], handle[5])
            event = turn.event(x, *selection, *stats, *made)
        tokens = done.payload if done.scales is None else (done.payload, done.scales)
        hook = done.receive if return_recv_hook else None
        return tokens, handle[5], handle, event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[torch.Tensor | int, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, _Hook | None]:
        """Weight the experts' rows of every token and sum them.

        Args:
            x: [L, R * M, H] bf16, or compact [n, H] in the order of compact rows, whatever form
                dispatch returned. Rows that no token refers to are not read.
            topk_idx: [T, K] int64, as dispatched; `CROSSDOCK_DEBUG=1` checks it.
            topk_weights: [T, K] float32; if dispatch was given weights, the same.
            handle: of the dispatch, also as a plain tuple, with or without its sixth part.
            use_logfmt: rows travel back in ten bits a value (finite values only), which changes
                the result by less than 1e-3 in `calc_diff`.
            zero_copy: `x` was written to `get_next_low_latency_combine_buffer(handle)`, and is
                read from there.
            async_finish: return an event instead of waiting.
            return_recv_hook: only send; the returned `hook()` receives.
            out: [T, H] bf16 to write the result to; or None.
            combine_wait_recv_cost_stats: as `dispatch_wait_recv_cost_stats` of dispatch.

        Returns:
            `(combined_x [T, H] bf16, event, hook)`. Each rank adds up its rows of a token in
            float32, by ascending top-k slot, and rounds to the buffer's `partials`; the sums of
            the ranks are added in float32, by ascending rank, and rounded once. A token whose
            slots are all -1 gives zeros.

        Collective, Sync: as `low_latency_dispatch`. Lifetime: the result is the caller's.

        Raises: as `low_latency_dispatch`, and
            HandleError: the handle does not fit, or two combines are in flight already.
        """
        try:
            named = handle
            if not isinstance(named, LowLatencyHandle):
                named = LowLatencyHandle.of(handle, num_ranks=self.group_size)
            if zero_copy:
                x = self._low_latency.combine_buffer(named, make=False)
            kind = self._kinds.combine(
                (
                    meta(x),
                    meta(topk_idx),
                    meta(topk_weights),
                    meta(out),
                    meta(combine_wait_recv_cost_stats),
                    use_logfmt,
                    meta(named[0]),
                    named[1].shape,
                    named[2],
                    named[3],
                    named[4],
                )
            )
            check_row_count(x, named)
            selection = selected(topk_idx, topk_weights, kind.num_experts)
            stats = self._stats("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats)
            if out is None:
                shape, strides = (kind.num_tokens, kind.hidden), (kind.hidden, 1)
                out = torch.empty_strided(shape, strides, dtype=torch.bfloat16, device=x.device)
        except Exception as error:
            self._session.refuse(Operation.LOW_LATENCY_COMBINE, error)
            raise
        with self._turn(None, async_finish) as turn:
            receive = self._low_latency.combine(
                x,
                selection,
                named,
                kind=kind,
                out=out,
                stats=stats,
                hooked=return_recv_hook,
            )
            event = turn.event(x, out, *selection, *stats, *named[:2])
        return out, event, receive if return_recv_hook else None

    def get_next_low_latency_combine_buffer(
        self, handle: tuple[torch.Tensor | int, ...]
    ) -> torch.Tensor:
        """Where to write the experts' outputs for `low_latency_combine(zero_copy=True)`.

        Returns:
            [L, R * M, H] bf16, ordinary memory allocated when it is first asked for; the same for
            the same handle.

        Collective: no. Sync: no. Lifetime: as long as the handle's tensors.

        Raises:
            HandleError: the handle is not one that this buffer returned.
        """
        named = LowLatencyHandle.of(handle, num_ranks=self.group_size)
        return self._low_latency.combine_buffer(named, make=True)

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Does nothing: signals say which call they are of, so nothing has to be cleaned.

        Collective: no. Sync: no.
        """

    def low_latency_update_mask_buffer(self, rank: int, mask: bool = False) -> None:
        """Go on without a rank in low-latency calls, or count on it again.

        A masked rank is neither sent to nor waited for, and its tokens contribute nothing. Whoever
        hears of a mask in a call takes it over. To bring a rank back, all ranks and the returning
        one unmask it between the same two calls.

        Args:
            rank: the rank; this one too, which then does no more than calls without effect.
            mask: whether to mask it or to bring it back.

        On a device nothing is masked before the first call, which needs all ranks.

        Collective: no. Sync: no; on a device bringing a rank back waits for what was launched.

        Raises:
            ConfigError: the buffer was made without `enable_shrink`.
            ShapeError: no such rank.
            HandleError: on a device a rank was to be brought back while a call is in flight.
        """
        masks = self._masks()
        if not 0 <= rank < self.group_size:
            raise ShapeError("rank", got=rank, expected=f"0 to {self.group_size - 1}")
        if mask:
            masks.mask(rank)
        else:
            masks.unmask(rank)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Say which ranks are masked.

        Args:
            mask_status: [R] int32, is overwritten: 1 where a rank is masked, 0 elsewhere.

        Collective: no. Sync: no; on a device it waits for what was launched.

        Raises:
            ConfigError: the buffer was made without `enable_shrink`.
            ShapeError: `mask_status` is not [R] int32.
        """
        masked = self._masks().masked()
        check_tensor("mask_status", mask_status, dtype=torch.int32, shape=(self.group_size,))
        mask_status.zero_()
        mask_status[sorted(masked)] = 1

    def low_latency_clean_mask_buffer(self) -> None:
        """Count on all ranks again; see `low_latency_update_mask_buffer`.

        Collective: no. Sync: as that.

        Raises:
            ConfigError: the buffer was made without `enable_shrink`.
        """
        masks = self._masks()
        for rank in sorted(masks.masked() | {self.rank}):
            masks.unmask(rank)

    def _turn(self, previous_event: AnyEvent, async_finish: bool) -> Turn:
        if previous_event is None and not async_finish:
            return HERE_AND_NOW
        return Turn(
            self._stream,
            previous_event,
            async_finish=async_finish,
            check=self._exchange.check,
        )

    def _masks(self) -> Masks:
        masks = self._session.transport.masks
        if masks is None:
            raise ConfigError("masks need a buffer made with enable_shrink=True")
        return masks

    def _stats(
        self, name: str, waits: torch.Tensor | None, received: torch.Tensor | None = None
    ) -> Stats:
        """The caller's statistics, of the waits those of this rank."""
        if waits is None and received is None:
            return NO_STATS
        return Stats(self._waits(name, waits), received)

    def _waits(self, name: str, stats: torch.Tensor | None) -> torch.Tensor | None:
        return checked_wait_stats(name, stats, rank=self.rank, num_ranks=self.group_size)
