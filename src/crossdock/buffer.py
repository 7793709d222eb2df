"""`Buffer`: the names and tuples the world knows, without an algorithm of its own.

Argument names, order, defaults and results are DeepEP's, so that its clients run unchanged. Each
method checks shapes and dtypes, hands over to `exchange`, and dresses the result as a tuple.

T tokens here, K top-k, H hidden, R ranks, E experts, L = E / R local experts, N rows received here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import TracebackType
from typing import ClassVar

import torch
import torch.distributed as dist

from crossdock import _env
from crossdock.arguments import (
    BufferArguments,
    DispatchArguments,
    checked_bias,
    flat_rows,
)
from crossdock.codec import AnyTokens, Tokens
from crossdock.config import Config
from crossdock.decoding_views import DecodingViews
from crossdock.errors import (
    ConfigError,
    HandleError,
    ShapeError,
    UnsupportedError,
)
from crossdock.events import AnyEvent, EventHandle, EventOverlap
from crossdock.exchange import Exchange
from crossdock.formats import RowFormat, TokenFormat
from crossdock.handle import Handle
from crossdock.low_latency import LowLatency
from crossdock.low_latency_arguments import Kinds, LowLatencyOptions
from crossdock.shapes import check_tensor
from crossdock.topology import Communicator, Topology
from crossdock.transports import Limits, select
from crossdock.transports.header import Operation
from crossdock.transports.session import Session
from crossdock.transports.symmetric import Symmetric
from crossdock.verbs import Dispatched, ExchangeCalls, LowLatencyCalls, Stats, Views

__all__ = ["Buffer", "topk_idx_t"]

topk_idx_t = torch.int64
"""dtype of `topk_idx`."""


class Buffer(DecodingViews):
    """Dispatches MoE tokens to the ranks that own their experts, and combines what comes back.

    Args:
        group: torch process group of any backend. With neither `group` nor `comm`: the default
            group if there is one, else a world of this rank alone.
        num_nvl_bytes: memory to start with, in bytes; see `Config.get_nvl_buffer_size_hint`. The
            buffer grows, on all ranks together, when calls need more.
        num_rdma_bytes: with `low_latency_mode`, memory for low-latency calls to start with; see
            `get_low_latency_rdma_size_hint`. Otherwise accepted and kept.
        low_latency_mode: says what `num_rdma_bytes` is for. Every buffer can make both kinds of
            calls, in any order.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: accepted;
            they concern hardware that is not used here.
        explicitly_destroy: accepted; `destroy()` may always be called, and need not be.
        enable_shrink: low-latency calls go on without a rank that misses the deadline, or that the
            caller masks. Only in shared memory and on GPUs.
        comm: mpi4py-like communicator (`Get_rank`, `Get_size`, `allgather`) in place of `group`.
        transport: name of the transport to use; None for the best that fits the group, which
            `CROSSDOCK_TRANSPORT` overrides.
        max_tokens_per_rank: tokens a rank to make room for in the first call already.
        low_latency_format: what `use_fp8=True` means: "fp8", "int8" (as DeepEP-Ascend has it),
            "bf16" or a `TokenFormat`.
        low_latency_rows: "slab" for a slab of R * M rows to each expert, "compact" for the rows of
            all experts back to back.
        partials: "bf16" or "fp32", how a low-latency combine sends a rank's sum of a token back:
            with "fp32" there is a single rounding, for twice the bytes.
        max_buffer_bytes: limit of the peer-addressable memory that a rank uses, in bytes; 0 for
            none. Memory that was outgrown lives on, beside it, while results in it are held.
        timeout_s: seconds a wait for peers may last; 0 for ever; None for `CROSSDOCK_TIMEOUT_S`.
        first_call_timeout_s: the same for the first call of each operation; None for
            `CROSSDOCK_FIRST_CALL_TIMEOUT_S`.

    Calls are paired by their order, so all ranks must make them in the same order, also where two
    threads share a buffer: equal calls of two threads that change places are not noticed.

    Collective: all ranks of the group, with the same arguments except for the timeouts.
    Sync: waits for all ranks, as long as the group itself does.

    Attributes:
        rank, group_size, group: this rank, the ranks, and what was passed as the group.
        transport: name of the transport in use.

    Lifetime: results stay valid after the buffer has gone. A context manager; `__del__` does not
    communicate.

    Raises:
        ConfigError: impossible arguments.
        RankMismatchError: the ranks were given different arguments.
        UnsupportedError: no transport covers the group; with the reasons.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: float = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Communicator | None = None,
        *,
        use_fabric: bool = False,
        transport: str | None = None,
        max_tokens_per_rank: int = 0,
        max_buffer_bytes: int = 0,
        low_latency_format: str | TokenFormat = "fp8",
        low_latency_rows: str = "slab",
        partials: str = "bf16",
        timeout_s: float | None = None,
        first_call_timeout_s: float | None = None,
    ) -> None:
        topology = Topology.discover(group, comm)
        options = LowLatencyOptions(low_latency_format, low_latency_rows, partials)
        given = BufferArguments(
            num_nvl_bytes=num_nvl_bytes,
            num_rdma_bytes=num_rdma_bytes,
            max_tokens_per_rank=max_tokens_per_rank,
            max_buffer_bytes=max_buffer_bytes,
            transport=transport,
            low_latency_mode=low_latency_mode,
            enable_shrink=enable_shrink,
            low_latency=options,
            timeout_s=timeout_s,
            first_call_timeout_s=first_call_timeout_s,
        )
        given.agree(topology)
        self.group = topology.group if comm is None else comm
        self.rank, self.group_size = topology.rank, topology.num_ranks
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        self.explicitly_destroy = explicitly_destroy
        limits = Limits(
            zone_bytes=num_nvl_bytes,
            landing_bytes=given.landing_bytes,
            max_bytes=max_buffer_bytes,
            can_shrink=enable_shrink,
        )
        name = transport if transport is not None else _env.transport()
        self._session = Session(select(topology, limits, name=name), given.timeouts())
        self.transport = self._session.transport.name
        self._kinds = Kinds(options, self.group_size)
        self._stream = self._session.transport.stream
        self._exchange, self._low_latency = _verbs(
            topology, self._session, partials=options.partials_dtype, reserve=max_tokens_per_rank
        )

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: AnyEvent = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count where this rank's tokens go.

        Args:
            topk_idx: [T, K] int64 expert ids; -1 selects nothing.
            num_experts: E, experts of the whole group.
            previous_event: what to wait for first.
            async_finish: return an event instead of waiting.
            allocate_on_comm_stream: accepted; results may be used on either stream.

        Returns:
            `(num_tokens_per_rank [R] int32, None, num_tokens_per_expert [E] int32,
            is_token_in_rank [T, R] bool, event)`. A token counts once per rank, and for each
            occurrence of an expert. The second is for traffic between hosts, which needs none.

        Collective: no. Sync: does not wait for a device. Lifetime: the results are the caller's.

        Raises:
            ShapeError: not [T, K] int64, or E is no multiple of R, or an id is not below E.
        """
        with self._turn(previous_event, async_finish) as turn:
            check_tensor("topk_idx", topk_idx, dtype=topk_idx_t, shape=(None, None))
            found = self._exchange.layout(topk_idx, num_experts)
            event = turn.event(topk_idx, *vars(found).values())
        per_rank, per_expert = found.num_tokens_per_rank, found.num_tokens_per_expert
        return per_rank, None, per_expert, found.is_token_in_rank, event

    def dispatch(
        self,
        x: AnyTokens,
        handle: tuple[torch.Tensor, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: AnyEvent = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[
        AnyTokens,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        Handle | None,
        EventOverlap,
    ]:
        """Send every token to the ranks that own its experts, once per rank.

        Args:
            x: [T, H] bf16, fp16, fp32 (or any format's bytes), or `(data [T, H], scales [T, S])`
                with scales float32 or packed int32 of any strides. Moved bit for bit.
            handle: of an earlier dispatch, to go the same way without exchanging routing; then
                the arguments from `num_tokens_per_rank` to `num_worst_tokens` are not used.
            num_tokens_per_rank: [R] int32; accepted, `is_token_in_rank` decides.
            num_tokens_per_rdma_rank: accepted.
            is_token_in_rank: [T, R] bool.
            num_tokens_per_expert: [E] int32.
            topk_idx: [T, K] int64, -1 for none; optional.
            topk_weights: [T, K] float32; optional, only with `topk_idx`.
            expert_alignment: the counts per expert are rounded up to a multiple of this.
            num_worst_tokens: rows of the result whatever arrives: missing ones are zero with
                `topk_idx` -1, those beyond it are dropped, which shows as
                `rank_prefix_matrix[-1][rank]` above it. Needs `topk_idx`. 0: exact sizes.
            config: knobs; None for `Buffer.get_dispatch_config`.
            previous_event: what to wait for first.
            async_finish: return an event instead of waiting.
            allocate_on_comm_stream: accepted; results may be used on either stream.
            dispatch_wait_recv_cost_stats: [R] int64, or [R, R] with a row for each waiting rank;
                the microseconds that this rank waited for each source are added; or None.

        Returns:
            `(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle,
            event)`. Rows are grouped by source rank, then token. `recv_x` is [N, H], or with its
            scales [N, S]; `recv_topk_idx` [N, K] int64 holds local expert ids, -1 where the slot
            is another rank's; `recv_topk_weights` [N, K] float32 is 0 there. The list has a count
            per local expert and is empty with `num_worst_tokens`. With `handle`: only `recv_x`
            and the event, None for the rest.

        Collective: all ranks, in the same order as all calls of this buffer, also with T = 0.
        Sync: returns when all rows have arrived.
        Lifetime: results are the caller's for good. (On shared memory they may lie in the
        buffer's own memory, which is reused once the last tensor on it has gone.)

        Raises:
            ShapeError, ConfigError: wrong arguments; the peers raise `PeerRefusedError`.
            HandleError: the handle does not fit.
            RankMismatchError: the ranks make different calls, or send rows of different formats.
            PeerTimeoutError: some ranks did not come.
            BufferTooSmallError: `max_buffer_bytes` does not allow it.
        """
        config = self._config(config, "get_dispatch_config")
        with self._turn(previous_event, async_finish) as turn:
            if handle is not None:
                with self._session.checking(Operation.CACHED_DISPATCH):
                    named = Handle.of(handle, num_ranks=self.group_size)
                    if named.recv_src_idx.dim() != 1:
                        raise HandleError("the handle is one of views, which are not sent again")
                    waits = self._waits(
                        "dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats
                    )
                again = self._exchange.dispatch_again(x, named, config=config, stats=Stats(waits))
                event = turn.event(*_parts(x), *_parts(again), *named, waits)
                return again, None, None, None, None, event
            given = DispatchArguments(
                is_token_in_rank,
                num_tokens_per_expert,
                topk_idx,
                topk_weights,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
            )
            with self._session.checking(Operation.DISPATCH):
                routing = given.checked(x, num_ranks=self.group_size)
                waits = self._waits("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats)
            done: Dispatched[AnyTokens] = self._exchange.dispatch(
                x,
                routing,
                alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
                config=config,
                stats=Stats(waits),
            )
            made = (*_parts(done.tokens), done.topk_idx, done.topk_weights, *done.handle)
            given_too = (topk_idx, topk_weights, num_tokens_per_expert, waits)
            event = turn.event(*_parts(x), *given_too, *made)
        per_expert = done.num_tokens_per_expert
        return done.tokens, done.topk_idx, done.topk_weights, per_expert, done.handle, event

    def dispatch_views(
        self,
        x: AnyTokens,
        num_max_tokens_per_rank: int,
        *,
        is_token_in_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        config: Config | None = None,
        previous_event: AnyEvent = None,
        async_finish: bool = False,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[Views, EventOverlap]:
        """Send every token as `dispatch` does, and get the rows where they land, not a copy.

        Shapes are the same in every call, and the host looks at no value of the device.

        Args:
            x: as for `dispatch`.
            num_max_tokens_per_rank: M, at least T; the same on all ranks.
            is_token_in_rank: [T, R] bool.
            num_tokens_per_expert: [E] int32.
            topk_idx: [T, K] int64, -1 for none; optional.
            topk_weights: [T, K] float32; optional, only with `topk_idx`.
            config: as for `dispatch`.
            previous_event: what to wait for first.
            async_finish: return an event instead of waiting.
            dispatch_wait_recv_cost_stats: as for `dispatch`.

        Returns:
            `(views, event)`: the rows of source `s` are `views.tokens[s, :views.num_rows[s]]`. What
            experts make of them goes to `combine` as [R, M, H], with `views.handle`.

        Collective: as `dispatch`. Sync: does not wait for a device.
        Lifetime: `views.tokens` until this rank's next dispatch that is not a low-latency one, on
        devices in the order of the stream; the rest is the caller's. Where rows are moved by the
        host, all of it is the caller's.

        Raises: as `dispatch`; ShapeError if T is above M.
        """
        config = self._config(config, "get_dispatch_config")
        with self._turn(previous_event, async_finish) as turn:
            given = DispatchArguments(
                is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights, 1, 0
            )
            with self._session.checking(Operation.DISPATCH):
                routing = given.checked(x, num_ranks=self.group_size)
                given.check_slots(num_max_tokens_per_rank)
                waits = self._waits("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats)
            done: Views = self._exchange.dispatch_views(
                x, routing, num_slots=num_max_tokens_per_rank, config=config, stats=Stats(waits)
            )
            made = (done.topk_idx, done.topk_weights, *done.handle)
            given_too = (topk_idx, topk_weights, num_tokens_per_expert, waits)
            event = turn.event(*_parts(x), *given_too, *made)
        return done, event

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: AnyEvent = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring the rows back to their tokens and sum them over the ranks, unweighted.

        Args:
            x: [N, H] bf16, fp16 or fp32, in the order of `recv_x`; of views [R, M, H].
            handle: of the dispatch, also as a plain tuple of its tensors.
            topk_weights: [N, K] float32, summed over the ranks per slot (they are gradients); or
                None. Of views [R, M, K].
            bias: one or two [T, H] tensors of x's dtype, added before the one rounding.
            config: knobs; None for `Buffer.get_combine_config`.
            previous_event: what to wait for first.
            async_finish: return an event instead of waiting.
            allocate_on_comm_stream: accepted; results may be used on either stream.
            combine_wait_recv_cost_stats: as `dispatch_wait_recv_cost_stats` of dispatch.

        Returns:
            `(combined_x [T, H], combined_topk_weights [T, K] float32 or None, event)`. Sums are
            taken in float32, in ascending rank order, and rounded once to x's dtype. A token that
            went nowhere gives zeros, plus bias.

        Collective, Sync: as `dispatch`. Lifetime: results are the caller's.

        Raises: as `dispatch`.
        """
        config = self._config(config, "get_combine_config")
        with self._turn(previous_event, async_finish) as turn:
            with self._session.checking(Operation.COMBINE):
                named = Handle.of(handle, num_ranks=self.group_size)
                x, topk_weights = flat_rows(x, topk_weights, named)
                terms = checked_bias(x, named, topk_weights=topk_weights, bias=bias)
                waits = self._waits("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats)
            done = self._exchange.combine(
                x,
                named,
                topk_weights=topk_weights,
                bias=terms,
                config=config,
                stats=Stats(waits),
            )
            event = turn.event(x, topk_weights, waits, *terms, *done, *named)
        return done.rows, done.topk_weights, event

    def warmup(self, num_tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> None:
        """Make room for calls of this size and wait until every rank is here.

        From then on every wait has the steady deadline.

        Args:
            num_tokens: most tokens a rank will send.
            hidden: row width.
            dtype: row element.

        Collective: all ranks. Sync: waits for all of them. Lifetime: the room stays.

        Raises: as `dispatch`.
        """
        self._exchange.warmup(RowFormat(dtype, hidden), num_tokens)

    def check(self) -> None:
        """Raise the error that made this buffer unusable, if there was one.

        Collective: no. Sync: no.

        Raises:
            PeerTimeoutError: an earlier wait ended without all ranks.
            TransportError: an earlier call was abandoned, or the buffer was destroyed.
        """
        self._session.check()
        self._exchange.check()

    def destroy(self) -> None:
        """Give up the buffer's memory. Idempotent.

        Collective: no. Sync: waits for a call of another thread to end. Lifetime: results that
        were returned stay valid.
        """
        self._session.close()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """The memory that rows land in, as a tensor. Signals and routing are not part of it.

        Writing to it between calls is harmless, except to results that still lie in it and to
        rows of low-latency calls in flight.

        Args:
            dtype: element of the view.
            size: shape of the view; None for one dimension over everything from `offset`.
            offset: where to begin, in bytes.
            use_rdma_buffer: accepted; there is one buffer.

        Collective: no. Sync: no. Lifetime: a view; later growth moves the buffer elsewhere.

        Raises:
            UnsupportedError: the transport owns no memory.
            ShapeError: `size` or `offset` does not fit.
            TransportError: the buffer was destroyed or cannot be used any more.
        """
        self._session.check()
        memory = self._session.transport.local_memory()
        if memory is None:
            raise UnsupportedError(f"the {self.transport} transport has no memory of its own")
        if offset < 0 or offset % dtype.itemsize:
            expected = f"a multiple of {dtype.itemsize} bytes"
            raise ShapeError("offset", got=offset, expected=expected)
        usable = (memory.numel() - offset) // dtype.itemsize
        view = memory[offset : offset + usable * dtype.itemsize].view(dtype)
        if size is None:
            return view
        if size.numel() > view.numel():
            raise ShapeError("size", got=tuple(size), expected=f"at most {view.numel()} elements")
        return view[: size.numel()].view(size)

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream that operations run on.

        Raises:
            UnsupportedError: the transport moves rows on the host, or on the current stream.
        """
        if self._stream is None:
            raise UnsupportedError(f"the {self.transport} transport has no communication stream")
        return self._stream

    @staticmethod
    def capture() -> EventOverlap:
        """An event at the current point of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set how many streaming multiprocessors GPU operations may use, for all buffers.

        Raises:
            ConfigError: not a positive even number.
        """
        if new_num_sms <= 0 or new_num_sms % 2:
            raise ConfigError(f"num_sms is {new_num_sms}, must be positive and even")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether this GPU is of compute capability 9.0 or newer."""
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The knobs that `dispatch` takes when it is given none, for any number of ranks."""
        return _usual(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The knobs that `combine` takes when it is given none, for any number of ranks."""
        return _usual(Buffer.num_sms)

    def __deepcopy__(self, memo: dict[int, object]) -> Buffer:
        """The buffer itself: a copied model goes on sharing it, as it shares its process group."""
        return self

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes that this buffer holds on this rank, by purpose; none after `destroy`."""
        return {} if self._session.closed else self._session.transport.memory()

    def __repr__(self) -> str:
        memory = ", ".join(f"{name} {nbytes:,} B" for name, nbytes in self.memory.items())
        memory = memory or "none held"
        return (
            f"Buffer(rank {self.rank} of {self.group_size}, transport {self.transport}, "
            f"memory: {memory})"
        )

    def _config(self, config: Config | None, lookup: str) -> Config:
        """The knobs of a call; looked up on the class at call time, where clients replace it."""
        chosen: Config = getattr(type(self), lookup)(self.group_size) if config is None else config
        return chosen


@functools.cache
def _usual(num_sms: int) -> Config:
    return Config(num_sms)


def _verbs(
    topology: Topology, session: Session, *, partials: torch.dtype, reserve: int
) -> tuple[ExchangeCalls, LowLatencyCalls]:
    """Who makes the calls: the host, or kernels that it launches."""
    if isinstance(session.transport, Symmetric):
        from crossdock.device import device_verbs

        return device_verbs(session.transport, session, partials=partials, reserve=reserve)
    exchange = Exchange(topology, session, reserve_tokens=reserve)
    return exchange, LowLatency(topology, session, partials=partials)


def _parts(x: Tokens) -> tuple[torch.Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)
