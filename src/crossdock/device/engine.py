"""What all device calls share: the session, the heap, streams, deadlines, and what went wrong."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch
from triton.runtime import driver

from crossdock import _env
from crossdock.device.constants import next_power_of_two
from crossdock.device.masks import DeviceMasks
from crossdock.device.memory import (
    NUM_STATES,
    DeviceCapacity,
    Generation,
    Memory,
    Plan,
    is_capturing,
)
from crossdock.device.streams import Branch
from crossdock.device.watch import HostWords, Report
from crossdock.errors import UnsupportedError
from crossdock.ops.triton.links import Group, Link
from crossdock.transports.header import Call, Operation
from crossdock.transports.session import Attempt, Session
from crossdock.transports.symmetric import Symmetric

__all__ = ["Engine"]

_POLLS_PER_S = 2000
"""How often a wait looks in the interpreter, roughly."""

_TICKS_PER_S = 1_000_000
"""Deadlines are told in microseconds, so that they fit into 32 bits."""

_LOOKS = 8
"""Looks of a low-latency wait after which it asks what else may end it, which takes longer."""

_POLLS = 1 << 14
"""How often the host looks before it asks whether the device is well."""

_LONGEST = (1 << 31) - 1

_LINKS = 64
"""For each heap, state and timeout one is kept, of those that were in use last."""


class Engine:
    """Launches kernels for the calls of one buffer.

    Args:
        transport: gives the memory.
        session: numbers the calls.

    Attributes:
        debugs: whether sums of rows travel with them, and `inspect` looks at the heap.
        beside: a second line of work beside the current stream.
    """

    def __init__(self, transport: Symmetric, session: Session) -> None:
        self.session, self.debugs = session, _env.debug()
        self.rank, self.num_ranks = transport.topology.rank, transport.topology.num_ranks
        self.device = transport.device
        self._interpreted = transport.is_interpreted
        self._report = Report(self.num_ranks, self.device)
        self._report_at = self._report.address
        self._memory = Memory(transport, guarded=self.debugs)
        self._transport = transport
        self.device_types = transport.device_types
        self._words = self._unread = HostWords(1, self.device)
        self._outgrown: list[HostWords] = []
        self._last: torch.cuda.Stream | None = None
        self._last_handle: int | None = None
        self._handle_of = None if self._interpreted else driver.active.get_current_stream
        transport.at_close(self._memory)
        self.beside = Branch(None if self._interpreted else torch.cuda.Stream(self.device))
        self._waited_s = 0.0
        self._link = functools.lru_cache(_LINKS)(self._make_link)
        self._captures = False
        self._attempt = Attempt(session, Call(Operation.NONE, 0, 0.0))
        padded = next_power_of_two(self.num_ranks)
        self.group = Group(self.num_ranks, padded, NUM_STATES, is_compiled=not self._interpreted)
        capability = (0, 0) if self._interpreted else torch.cuda.get_device_capability()
        self.use_casts = capability >= (8, 9)
        self.slack_group = self.group._replace(
            can_shrink=transport.can_shrink,
            overlaps=capability >= (9, 0),
            looks=1 if transport.can_shrink else _LOOKS,
        )
        self._masks: DeviceMasks | None = None
        if transport.can_shrink:
            self._masks = DeviceMasks(self._memory, self.chain, rank=self.rank)
            transport.masks = self._masks
        self.num_programs = self._processors()

    def _processors(self) -> int:
        if self._interpreted:
            return 2
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def inspect(self) -> None:
        """The same as `check`; with `CROSSDOCK_DEBUG` also whether the heap is sound.

        Sync: in that case waits for the device.

        Raises:
            TransportError: something was written beyond its place.
            Others: as `check`.
        """
        self.check()
        current = self._memory.current
        if self.debugs and current is not None and not is_capturing():
            current.check_guards()

    def check(self) -> None:
        """Raise what a kernel has reported.

        Raises:
            PeerTimeoutError: some ranks did not come.
            TransportError: a rank gave up.
        """
        if not self._report.is_empty():
            raise self._report.error(self._waited_s, self._entered(), self._transport.reason_of)

    def _entered(self) -> list[list[int]]:
        """The last round of each operation that each rank has come to, as far as it told."""
        memory = self._memory.current
        if memory is None:
            return [[0] * NUM_STATES for _ in range(self.num_ranks)]
        size = 4 * NUM_STATES * self.num_ranks
        begin = memory.plan.credits + size
        entered = memory.own[begin : begin + size].view(torch.int32)
        rounds: list[list[int]] = entered.view(-1, NUM_STATES).tolist()
        return rounds

    def begin(self, attempt: Attempt) -> None:
        """What every call does first.

        Raises:
            UnsupportedError: the call needs all ranks, and some are masked.
            Others: what an earlier call has left behind.
        """
        self.check()
        self.chain()
        self._attempt = attempt
        if self._masks is None or self._captures or attempt.call.operation.can_shrink:
            return
        masked = sorted(self._masks.masked())
        if masked:
            attempt.entered = True  # so have the others, who raise the same
            raise UnsupportedError(f"{attempt.call} needs all ranks, but {masked} are masked")

    def memory(self, wanted: DeviceCapacity) -> Generation:
        """The heap for the call that has begun, which all ranks come to. See `Memory.covering`."""
        # Whatever goes wrong from here on, the others have to hear of it.
        self._attempt.entered = self._attempt.open = True
        generation = self._memory.covering(wanted, self._report_at, self._attempt.call)
        if self._captures:
            self._memory.keep()
        return generation

    @property
    def generation(self) -> Generation | None:
        """The heap that there is now."""
        return self._memory.current

    @property
    def capacity(self) -> DeviceCapacity:
        """What the heap has room for now."""
        current = self._memory.current
        return DeviceCapacity() if current is None else current.capacity

    def num_bytes(self, capacity: DeviceCapacity) -> int:
        """What a heap of this capacity takes."""
        return Plan.of(capacity, self.num_ranks).nbytes

    def meet(self) -> None:
        """Wait until all ranks are here.

        Collective: all ranks. Sync: waits for them.
        """
        self._transport.topology.allgather(None)

    def host_words(self, number: int, *, is_read: bool) -> HostWords:
        """So many words that a kernel writes for the host.

        What nobody will read has words of its own, so that it cannot be taken for what is read.
        """
        if self._words.number < number:
            # Kernels, or graphs, may still write there.
            self._outgrown += [self._words, self._unread]
            self._words, self._unread = (HostWords(number, self.device) for _ in range(2))
        if not is_read:
            return self._unread
        self._words.clear()
        return self._words

    def check_may_wait(self) -> None:
        """Raise `UnsupportedError` where the host cannot wait for a kernel."""
        if self._captures:
            raise UnsupportedError(
                "a dispatch with exact sizes cannot be part of a CUDA graph: the host has to learn "
                "them; give num_worst_tokens, and make one such call before the capture"
            )

    def wait_for_host(self, words: HostWords) -> list[int]:
        """What a kernel has written, once it has.

        Sync: waits for the kernel, with the GIL released.

        Raises:
            PeerTimeoutError: the kernel waited in vain.
        """
        polls = 0
        while not words.have_come:
            os.sched_yield()
            polls += 1
            if polls % _POLLS == 0 and not self._interpreted:
                torch.cuda.current_stream().query()  # raises if the device can do no more
        self.check()
        return words.numbers()

    def resume(
        self, run: Callable[[], None], tensors: Sequence[torch.Tensor | None]
    ) -> Callable[[], None]:
        """The receiving half of a call, on this device, whoever runs it, after all before it.

        Args:
            run: launches it.
            tensors: what it reads and writes; they live until it has been launched.
        """
        sent = self._last_handle

        def later() -> None:
            self.chain()
            if sent is not None and sent != self._last_handle:
                stream = torch.cuda.current_stream()
                for tensor in tensors:
                    if tensor is not None:
                        tensor.record_stream(stream)
            run()

        def anywhere() -> None:
            if self._interpreted or torch.cuda.current_device() == self.device.index:
                later()
                return
            with torch.cuda.device(self.device):
                later()

        return anywhere

    def link(self, generation: Generation, call: Call, kind: int) -> Link:
        """What a kernel of a call needs to reach the other ranks."""
        self._waited_s = call.timeout_s
        return self._link((generation.addresses, generation.plan.credits, kind, call.timeout_s))

    def _make_link(self, numbers: tuple[tuple[int, int], int, int, float]) -> Link:
        (peers, states), told, kind, timeout_s = numbers
        per_s = _POLLS_PER_S if self._interpreted else _TICKS_PER_S
        return Link(peers, states, told, self.rank, kind, min(int(timeout_s * per_s), _LONGEST))

    def chain(self) -> None:
        """Let the current stream wait for what this buffer does on another one."""
        if self._handle_of is None:
            return
        self._captures = torch.cuda.is_current_stream_capturing()
        if self._captures:
            return
        handle = self._handle_of(self.device.index)
        if handle == self._last_handle:
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None:
            stream.wait_stream(self._last)
        self._last, self._last_handle = stream, handle
