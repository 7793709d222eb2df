"""An inference server's use of DeepEP while decoding: two micro-batches that overlap.

One buffer serves prefill and decoding. Between the sending and the receiving half of a call the
other micro-batch works; the hook that one leaves behind is run by the other, in the same thread or
in another. Experts multiply what a masked grouped GEMM would: slabs and the number of rows in each.
Nothing here knows crossdock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import deep_ep
from deep_ep.utils.math import per_token_cast_back

Hook = Callable[[], None]
Slabs = Any  # [L, R * M, H], or (data, scales)
MAX_WAIT_S = 30.0


class Batch(NamedTuple):
    """Tokens of one rank with their choices."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    def halves(self) -> tuple[Batch, Batch]:
        """Two micro-batches."""
        middle = (len(self.x) + 1) // 2
        return Batch(*(part[:middle] for part in self)), Batch(*(part[middle:] for part in self))


class Server:
    """One rank of the server. Every expert is a matrix [H, H].

    Args:
        group: gloo will do.
        experts: [L, H, H], of this rank.
        max_tokens: most tokens of a micro-batch, on any rank.
        formats: arguments of dispatch that choose what travels.
        elastic: whether to go on when a rank leaves.

    Attributes:
        waited_us: [2, R] int64, how long each rank was waited for in dispatch and in combine.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        experts: torch.Tensor,
        max_tokens: int,
        formats: dict[str, bool],
        *,
        elastic: bool = False,
    ) -> None:
        self.group, self.experts, self.formats = group, experts, formats
        self.num_local, self.hidden = experts.shape[0], experts.shape[2]
        self.num_experts = self.num_local * group.size()
        self.max_tokens = max_tokens
        self.waited_us = torch.zeros((2, group.size()), dtype=torch.int64)
        num_rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank=max_tokens,
            hidden=self.hidden,
            num_ranks=group.size(),
            num_experts=self.num_experts,
        )
        self.buffer = deep_ep.Buffer(
            group=group,
            num_nvl_bytes=1 << 20,
            num_rdma_bytes=num_rdma_bytes,
            low_latency_mode=True,
            num_qps_per_rank=self.num_local,
            allow_nvlink_for_low_latency_mode=True,
            allow_mnnvl=False,
            explicitly_destroy=True,
            enable_shrink=elastic,
        )

    def prefill(self, batch: Batch) -> torch.Tensor:
        """A layer by the high-throughput calls; experts add their rows, weighted, on their side."""
        per_rank, _, per_expert, is_token_in_rank, _ = self.buffer.get_dispatch_layout(
            batch.topk_idx, self.num_experts
        )
        rows, idx, weights, _, handle, _ = self.buffer.dispatch(
            batch.x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights,
        )
        sums = torch.zeros(rows.shape, dtype=torch.float32)
        for expert, matrix in enumerate(self.experts):
            share = (weights * (idx == expert)).sum(dim=1, keepdim=True)
            sums += share * (rows.float() @ matrix)
        combined, _, _ = self.buffer.combine(sums.to(rows.dtype), handle)
        return combined

    def start_decoding(self, max_tokens: int) -> None:
        """After prefill, or before batches of another size."""
        self.max_tokens = max_tokens
        self.buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).zero_()
        dist.barrier(group=self.group)
        self.buffer.clean_low_latency_buffer(max_tokens, self.hidden, self.num_experts)

    def decode(self, batch: Batch, outputs: list[torch.Tensor]) -> Iterator[Hook]:
        """Two layers of a micro-batch; yields where the other one may work.

        What it yields has to be run before it goes on.
        """
        x = batch.x
        for _ in range(2):
            slabs, num_rows, handle, event, hook = self.buffer.low_latency_dispatch(
                x,
                batch.topk_idx,
                self.max_tokens,
                self.num_experts,
                None,
                self.waited_us[0],
                async_finish=False,
                return_recv_hook=True,
                **self.formats,
            )
            assert event.event is None
            yield hook
            rows = grouped_gemm_masked(slabs, self.experts, num_rows)
            output = torch.empty_like(x)
            _, _, hook = self.buffer.low_latency_combine(
                x=rows,
                topk_idx=batch.topk_idx,
                topk_weights=batch.topk_weights,
                handle=handle,
                zero_copy=False,
                async_finish=False,
                return_recv_hook=True,
                out=output,
                combine_wait_recv_cost_stats=self.waited_us[1],
            )
            yield hook
            outputs.append(output)
            x = output

    def decode_alone(self, batch: Batch) -> list[torch.Tensor]:
        """Both layers of a batch that overlaps with nothing."""
        outputs: list[torch.Tensor] = []
        for hook in self.decode(batch, outputs):
            hook()
        return outputs

    def masked_ranks(self) -> list[int]:
        status = torch.full((self.group.size(),), -1, dtype=torch.int32)
        self.buffer.low_latency_query_mask_buffer(status)
        return status.tolist()


def grouped_gemm_masked(
    slabs: Slabs, matrices: torch.Tensor, num_rows: torch.Tensor
) -> torch.Tensor:
    """`out[i, :num_rows[i]] = slabs[i, :num_rows[i]] @ matrices[i]` in bf16; the rest is garbage.

    As the kernel does, it wants scales column-major.
    """
    data, scales = slabs if isinstance(slabs, tuple) else (slabs, None)
    assert scales is None or scales.stride(-2) == 1
    assert num_rows.dtype == torch.int32
    out = torch.full((*data.shape[:2], matrices.shape[2]), float("nan"), dtype=torch.bfloat16)
    for i, count in enumerate(num_rows.tolist()):
        rows = data[i, :count]
        if scales is not None:
            rows = per_token_cast_back(rows, scales[i, :count])
        out[i, :count] = (rows.float() @ matrices[i]).bfloat16()
    return out


class Turns:
    """Two micro-batches by turns; a hook that one has left is run at the end of the other's turn.

    Args:
        batches: the micro-batches.
    """

    def __init__(self, *batches: Iterator[Hook]) -> None:
        self._batches = batches
        self._left: Hook | None = None
        self._may_go = [threading.Semaphore(1), threading.Semaphore(0)]

    def in_one_thread(self) -> None:
        while any([self._take(0), self._take(1)]):
            pass

    def in_two_threads(self) -> None:
        with ThreadPoolExecutor(max_workers=2) as threads:
            for done in [threads.submit(self._run, own) for own in (0, 1)]:
                done.result(timeout=MAX_WAIT_S)

    def _run(self, own: int) -> None:
        goes_on = True
        while goes_on:
            assert self._may_go[own].acquire(timeout=MAX_WAIT_S)
            goes_on = self._take(own)
            self._may_go[1 - own].release()

    def _take(self, own: int) -> bool:
        """One turn; whether this micro-batch has another."""
        others, self._left = self._left, next(self._batches[own], None)
        if others is not None:
            others()
        return self._left is not None


def serve(
    group: dist.ProcessGroup,
    batch: Batch,
    experts: torch.Tensor,
    formats: dict[str, bool],
    use_threads: bool,
) -> list[torch.Tensor]:
    """Prefill, decode, prefill again, decode with twice the room; all outputs, layer by layer."""
    num_local = len(experts) // group.size()
    mine = experts[group.rank() * num_local :][:num_local]
    max_tokens = max(gather_sizes(group, len(batch.x)))
    server = Server(group, mine, max_tokens, formats)
    outputs = []
    for room in (max_tokens, 2 * max_tokens):
        outputs.append(server.prefill(batch).clone())
        server.start_decoding(room)
        decoded: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        turns = Turns(
            *(server.decode(half, into) for half, into in zip(batch.halves(), decoded, strict=True))
        )
        if use_threads:
            turns.in_two_threads()
        else:
            turns.in_one_thread()
        outputs += [torch.cat(halves) for halves in zip(*decoded, strict=True)]
    server.buffer.destroy()
    return outputs


def serve_elastic(
    group: dist.ProcessGroup, batch: Batch, experts: torch.Tensor, leaving: int
) -> list[tuple[list[int], list[torch.Tensor]]]:
    """Decode with all ranks, while one is away, and with all again: masks and outputs of each."""
    num_local = len(experts) // group.size()
    mine = experts[group.rank() * num_local :][:num_local]
    max_tokens = max(gather_sizes(group, len(batch.x)))
    server = Server(group, mine, max_tokens, {"use_fp8": False}, elastic=True)
    seen = [(server.masked_ranks(), server.decode_alone(batch))]
    server.buffer.low_latency_update_mask_buffer(leaving, True)
    is_away = group.rank() == leaving
    seen.append((server.masked_ranks(), [] if is_away else server.decode_alone(batch)))
    dist.barrier(group=group)
    server.buffer.low_latency_clean_mask_buffer()
    dist.barrier(group=group)
    seen.append((server.masked_ranks(), server.decode_alone(batch)))
    server.buffer.destroy()
    return seen


def gather_sizes(group: dist.ProcessGroup, num_tokens: int) -> list[int]:
    sizes: list[Any] = [None] * group.size()
    dist.all_gather_object(sizes, num_tokens, group=group)
    return sizes
