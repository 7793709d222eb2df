"""`Buffer` between threads: growth, loans, limits, refusals and disagreement, on each transport."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from crossdock import (
    Buffer,
    BufferTooSmallError,
    ConfigError,
    EventHandle,
    HandleError,
    PeerRefusedError,
    PeerTimeoutError,
    RankMismatchError,
    ShapeError,
    TransportError,
    UnsupportedError,
)
from crossdock.transports.loopback import run_threads

TRANSPORTS = ("loopback", "one_sided")
NUM_EXPERTS = 12


def make(comm: Any, transport: str = "one_sided", **options: Any) -> Buffer:
    options = {"timeout_s": 20.0, "first_call_timeout_s": 20.0, **options}
    return Buffer(comm=comm, transport=transport, **options)


def dispatch(buffer: Buffer, x: torch.Tensor, seed: int = 0, **options: Any) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed + buffer.rank)
    topk_idx = torch.rand(len(x), NUM_EXPERTS, generator=generator).topk(2).indices
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    return buffer.dispatch(
        x,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        **options,
    )


def rows(buffer: Buffer, num_tokens: int, hidden: int = 16) -> torch.Tensor:
    return torch.arange(num_tokens).float()[:, None].expand(num_tokens, hidden) + 1000 * buffer.rank


def outcome(action: Callable[[], Any]) -> BaseException | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def round_trip_is_right(buffer: Buffer, num_tokens: int, seed: int = 0) -> bool:
    x = rows(buffer, num_tokens)
    recv_x, _, _, _, handle, _ = dispatch(buffer, x, seed)
    combined, _, _ = buffer.combine(recv_x.clone(), handle)
    return torch.equal(combined, x * handle.is_token_in_rank.sum(1, keepdim=True))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_any_token_count_works_with_any_start(transport: str, num_ranks: int) -> None:
    def run(comm: Any) -> list[bool]:
        with make(comm, transport, num_nvl_bytes=1 << 16) as buffer:
            return [
                round_trip_is_right(buffer, num_tokens * (comm.Get_rank() + 1))
                for num_tokens in (3, 0, 40, 400, 4, 2000)
            ]

    assert all(all(right) for right in run_threads(num_ranks, run))


def test_memory_is_flat_once_grown() -> None:
    def run(comm: Any) -> list[int]:
        buffer = make(comm)
        sizes = []
        for num_tokens in (10, 500, 20, 500, 1, 499):
            assert round_trip_is_right(buffer, num_tokens)
            sizes.append(sum(buffer._session.transport.memory().values()))
        return sizes

    for sizes in run_threads(2, run):
        assert sizes[0] < sizes[1]
        assert len(set(sizes[1:])) == 1


def test_results_stay_while_somebody_holds_them() -> None:
    """More results than there are zones, held across growth and the end of the buffer."""

    def run(comm: Any) -> bool:
        buffer = make(comm)
        held = []
        for seed in range(12):
            recv_x, _, _, _, handle, _ = dispatch(buffer, rows(buffer, 8 * (seed + 1)) + seed, seed)
            held.append((recv_x, recv_x.clone(), handle.recv_src_idx))
        buffer.destroy()
        del buffer
        gc.collect()
        return all(torch.equal(now, then) for now, then, _ in held)

    assert all(run_threads(3, run))


def test_more_results_than_zones_are_alive_without_growth() -> None:
    """The last free zone is never lent: then results are copied out of it."""

    def run(comm: Any) -> bool:
        buffer = make(comm)
        held = []
        for seed in range(9):
            recv_x = dispatch(buffer, rows(buffer, 16) + seed, seed)[0]
            held.append((recv_x, recv_x.clone()))
            assert round_trip_is_right(buffer, 16, seed)
        return all(torch.equal(now, then) for now, then in held)

    assert all(run_threads(2, run))


def test_a_zone_is_lent_and_comes_back() -> None:
    def run(comm: Any) -> tuple[set[int], int]:
        buffer = make(comm, max_tokens_per_rank=64)
        memory = None
        addresses = []
        for _ in range(8):
            recv_x = dispatch(buffer, rows(buffer, 32))[0]
            if memory is None:
                memory = buffer.get_local_buffer_tensor(torch.uint8)
            addresses.append(recv_x.data_ptr() - memory.data_ptr())
        inside = {address for address in addresses if 0 <= address < memory.numel()}
        return inside, len(addresses)

    for inside, num_calls in run_threads(2, run):
        assert 2 <= len(inside) < num_calls


def test_local_memory_holds_no_control_words() -> None:
    def run(comm: Any) -> bool:
        buffer = make(comm, num_nvl_bytes=1 << 20)
        for _ in range(4):
            buffer.get_local_buffer_tensor(torch.uint8).fill_(255)
            comm.allgather(None)
            assert round_trip_is_right(buffer, 5)
        shaped = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size([2, 8]), offset=64)
        with pytest.raises(ShapeError):
            buffer.get_local_buffer_tensor(torch.int8, torch.Size([1 << 30]))
        return shaped.shape == (2, 8)

    assert all(run_threads(2, run))


def test_the_limit_names_both_numbers_and_the_rank_everywhere() -> None:
    def run(comm: Any) -> tuple[BaseException | None, bool]:
        buffer = make(comm, max_buffer_bytes=1 << 16)
        assert round_trip_is_right(buffer, 4)
        too_many = 5000 if comm.Get_rank() == 1 else 4
        error = outcome(lambda: dispatch(buffer, rows(buffer, too_many)))
        return error, round_trip_is_right(buffer, 5)

    for error, usable in run_threads(3, run):
        assert isinstance(error, BufferTooSmallError)
        assert error.rank == 1
        assert error.needed_bytes > error.have_bytes == 1 << 16
        assert error.argument == "max_buffer_bytes"
        assert usable


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_refused_call_is_refused_everywhere_and_forgotten(transport: str) -> None:
    def run(comm: Any) -> tuple[BaseException | None, bool]:
        buffer = make(comm, transport)
        wrong = {"num_worst_tokens": -1} if comm.Get_rank() == 0 else {}
        error = outcome(lambda: dispatch(buffer, rows(buffer, 6), **wrong))
        return error, all(round_trip_is_right(buffer, n) for n in (6, 2, 9))

    (mine, usable), *others = run_threads(3, run)
    assert usable
    assert isinstance(mine, ShapeError)
    assert mine.argument == "num_worst_tokens"
    for error, still_usable in others:
        assert isinstance(error, PeerRefusedError)
        assert error.rank == 0
        assert "num_worst_tokens" in error.reason
        assert still_usable


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("hidden size", {"hidden": 32}),
        ("dtype of the rows", {"dtype": torch.bfloat16}),
        ("num_experts", {"experts": 24}),
        ("operation", {"combine": True}),
    ],
)
def test_disagreement_is_named_on_every_rank(
    transport: str, field: str, change: dict[str, Any]
) -> None:
    def run(comm: Any) -> tuple[BaseException | None, bool]:
        buffer = make(comm, transport)
        other = change if comm.Get_rank() == 1 else {}
        recv_x, _, _, _, handle, _ = dispatch(buffer, rows(buffer, 6))
        x = rows(buffer, 6, other.get("hidden", 16)).to(other.get("dtype", torch.float32))
        num_experts = other.get("experts", NUM_EXPERTS)
        topk_idx = torch.zeros(6, 2, dtype=torch.int64)
        _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        if "combine" in other:
            error = outcome(lambda: buffer.combine(recv_x, handle))
        else:
            error = outcome(
                lambda: buffer.dispatch(
                    x,
                    is_token_in_rank=in_rank,
                    num_tokens_per_expert=per_expert,
                    topk_idx=topk_idx,
                )
            )
        return error, round_trip_is_right(buffer, 7)

    for error, usable in run_threads(3, run):
        assert isinstance(error, RankMismatchError)
        assert error.field == field
        assert set(error.values) == {0, 1, 2}
        assert error.values[0] == error.values[2] != error.values[1]
        assert usable


def test_different_constructor_arguments_are_named() -> None:
    def run(comm: Any) -> BaseException | None:
        return outcome(lambda: make(comm, max_tokens_per_rank=comm.Get_rank()))

    for error in run_threads(2, run):
        assert isinstance(error, RankMismatchError)
        assert error.field == "max_tokens_per_rank"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_handle_must_be_this_ranks_and_this_groups(transport: str) -> None:
    def run(comm: Any) -> list[BaseException | None]:
        buffer = make(comm, transport)
        x = rows(buffer, 6 + comm.Get_rank())
        recv_x, _, _, _, handle, _ = dispatch(buffer, x)
        foreign = comm.allgather(tuple(handle))[1 - comm.Get_rank()]
        short = tuple(handle)[:5]
        errors = [
            outcome(lambda: buffer.combine(torch.zeros(len(foreign[3]), 16), foreign)),
            outcome(lambda: buffer.combine(recv_x, short)),
            outcome(lambda: buffer.combine(recv_x[:-1], handle)),
            outcome(lambda: buffer.dispatch(x[:-1], handle=handle)),
        ]
        assert round_trip_is_right(buffer, 3)
        return errors

    for errors in run_threads(2, run):
        assert all(isinstance(error, HandleError) for error in errors)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_missing_rank_is_named_and_the_buffer_says_so_ever_after(transport: str) -> None:
    def run(comm: Any) -> list[BaseException | None]:
        buffer = make(comm, transport, timeout_s=0.5, first_call_timeout_s=0.5)
        if comm.Get_rank() == 2:
            return []
        first = outcome(lambda: dispatch(buffer, rows(buffer, 4)))
        return [first, outcome(buffer.check), outcome(lambda: dispatch(buffer, rows(buffer, 4)))]

    *waiting, absent = run_threads(3, run)
    assert absent == []
    for errors in waiting:
        assert all(isinstance(error, PeerTimeoutError) for error in errors)
        assert errors[0].missing == [2]
        assert errors[1] is errors[2] is errors[0]


def test_events_of_every_kind_are_taken() -> None:
    buffer = Buffer()
    topk_idx = torch.tensor([[0, 1]])
    for previous in (None, EventHandle(), Buffer.capture()):
        *_, event = buffer.get_dispatch_layout(topk_idx, 2, previous, async_finish=True)
        assert isinstance(event.event, EventHandle)
    assert buffer.get_dispatch_layout(topk_idx, 2)[-1].event is None


def test_one_rank_without_any_group() -> None:
    with Buffer(transport="one_sided") as buffer:
        assert round_trip_is_right(buffer, 9)
        buffer.warmup(100, 64)
        assert "rank 0 of 1" in repr(buffer)
        assert "zones" in repr(buffer)
    assert "none held" in repr(buffer)
    buffer.destroy()
    with pytest.raises(TransportError, match="destroyed"):
        dispatch(buffer, torch.zeros(1, 4))


def test_warmup_makes_room() -> None:
    def run(comm: Any) -> tuple[int, int]:
        buffer = make(comm)
        buffer.warmup(300, 64, torch.float32)
        before = sum(buffer._session.transport.memory().values())
        dispatch(buffer, rows(buffer, 300, 64))
        return before, sum(buffer._session.transport.memory().values())

    for before, after in run_threads(2, run):
        assert after - before <= before // 2


def test_what_cannot_be_is_said_at_once() -> None:
    with pytest.raises(UnsupportedError, match="no transport 'pigeon'"):
        Buffer(transport="pigeon")
    with pytest.raises(UnsupportedError, match="process group"):
        Buffer(transport="collective")
    with pytest.raises(UnsupportedError, match="enable_shrink"):
        Buffer(enable_shrink=True, transport="loopback")
    with pytest.raises(ConfigError, match="low_latency_format is 'fp7'"):
        Buffer(low_latency_format="fp7")
    with pytest.raises(ConfigError, match="low_latency_rows is 'heap'"):
        Buffer(low_latency_rows="heap")
    with pytest.raises(ConfigError, match="partials is 'fp8'"):
        Buffer(partials="fp8")
    with pytest.raises(ConfigError, match="max_buffer_bytes"):
        Buffer(num_nvl_bytes=2, max_buffer_bytes=1)
    with pytest.raises(TypeError):
        Buffer(unheard_of=1)
    buffer = Buffer(transport="loopback")
    with pytest.raises(UnsupportedError):
        buffer.get_comm_stream()
    with pytest.raises(UnsupportedError):
        buffer.get_local_buffer_tensor(torch.uint8)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"topk_idx": torch.zeros(3, 2, dtype=torch.int32)}, ShapeError),
        ({"topk_idx": torch.zeros(4, 2, dtype=torch.int64)}, ShapeError),
        ({"topk_weights": torch.zeros(3, 2, dtype=torch.float64)}, ShapeError),
        ({"topk_weights": torch.zeros(3, 2), "topk_idx": None}, ConfigError),
        ({"topk_idx": None, "num_worst_tokens": 5}, ConfigError),
        ({"is_token_in_rank": None}, ShapeError),
        ({"num_tokens_per_expert": torch.zeros(4)}, ShapeError),
        ({"expert_alignment": 0}, ShapeError),
        ({"x": torch.zeros(3, 2, 2)}, ShapeError),
        ({"x": torch.zeros(3, 2, dtype=torch.float64)}, ShapeError),
        ({"x": (torch.zeros(3, 2), torch.zeros(2, 1))}, ShapeError),
        ({"x": (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.bfloat16))}, ShapeError),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception]) -> None:
    right = {
        "x": torch.zeros(3, 2),
        "is_token_in_rank": torch.ones(3, 1, dtype=torch.bool),
        "num_tokens_per_expert": torch.zeros(4, dtype=torch.int32),
        "topk_idx": torch.zeros(3, 2, dtype=torch.int64),
    }
    buffer = Buffer(transport="loopback")
    buffer.dispatch(**right)
    with pytest.raises(error):
        buffer.dispatch(**{**right, **wrong})
    buffer.dispatch(**right)


def test_the_debug_switch_compares_presence_with_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {
        "x": torch.zeros(1, 2),
        "is_token_in_rank": torch.zeros(1, 1, dtype=torch.bool),
        "num_tokens_per_expert": torch.zeros(4, dtype=torch.int32),
        "topk_idx": torch.tensor([[2]]),
    }
    buffer = Buffer(transport="loopback")
    assert len(buffer.dispatch(**arguments)[0]) == 0
    monkeypatch.setenv("CROSSDOCK_DEBUG", "1")
    with pytest.raises(ConfigError, match="token 0"):
        buffer.dispatch(**arguments)


def test_the_environment_chooses_where_the_caller_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CROSSDOCK_TRANSPORT", "loopback")
    assert "loopback" in repr(Buffer())
    assert "one_sided" in repr(Buffer(transport="one_sided"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_refusals_in_a_row_are_heard_one_by_one(transport: str) -> None:
    """The refusing rank runs ahead of a late one; each reason belongs to its own call."""

    def run(comm: Any) -> list[str]:
        buffer = make(comm, transport)
        told = []
        for dtype in (torch.float64, torch.complex64, torch.float64):
            x = torch.zeros(2, 4)
            if comm.Get_rank() == 0:
                x = x.to(dtype)
            else:
                time.sleep(0.1)
            told.append(str(outcome(lambda x=x: dispatch(buffer, x))))
        assert round_trip_is_right(buffer, 3)
        return told

    _, late = run_threads(2, run)
    for text, dtype in zip(late, ("float64", "complex64", "float64"), strict=True):
        assert "rank 0 refused" in text
        assert dtype in text


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_error_in_the_arguments_is_told(transport: str) -> None:
    def run(comm: Any) -> list[type | None]:
        buffer = make(comm, transport)
        recv_x, _, _, _, handle, _ = dispatch(buffer, rows(buffer, 4))
        here = comm.Get_rank() == 0
        errors = [
            outcome(lambda: buffer.combine(recv_x, None if here else handle)),
            outcome(lambda: buffer.combine(recv_x, handle, bias=object() if here else None)),
            outcome(lambda: dispatch(buffer, [rows(buffer, 4)] if here else rows(buffer, 4))),
        ]
        assert round_trip_is_right(buffer, 5)
        return [type(error) for error in errors]

    mine, theirs = run_threads(2, run)
    assert PeerRefusedError not in mine
    assert None.__class__ not in mine
    assert theirs == [PeerRefusedError] * 3


def test_biases_come_as_any_sequence_and_need_no_gradient() -> None:
    buffer = Buffer(transport="loopback")
    x = torch.ones(2, 4)
    recv_x, _, _, _, handle, _ = dispatch(buffer, x)
    bias = [torch.ones(2, 4, requires_grad=True), torch.ones(2, 4)]
    combined = buffer.combine(recv_x, handle, bias=bias)[0]
    assert combined.tolist() == [[3.0] * 4] * 2
    assert not combined.requires_grad


def test_a_rank_that_cannot_make_its_buffer_tells_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(comm: Any) -> list[BaseException | None]:
        first = comm.Get_rank() == 0
        return [
            outcome(lambda: make(comm, max_buffer_bytes=1000 if first else 0, num_nvl_bytes=2000)),
            outcome(lambda: make(comm, timeout_s=-1.0 if first else 1.0)),
        ]

    mine, theirs = run_threads(2, run)
    assert isinstance(mine[0], RankMismatchError)
    assert isinstance(theirs[0], RankMismatchError)
    assert isinstance(mine[1], ConfigError)
    assert isinstance(theirs[1], ConfigError)
    assert "rank 0" in str(theirs[1])
    for wrong in ({"max_tokens_per_rank": -5}, {"num_nvl_bytes": -1}, {"max_buffer_bytes": -1}):
        with pytest.raises(ShapeError, match=next(iter(wrong))):
            Buffer(**wrong)
    monkeypatch.setenv("CROSSDOCK_TIMEOUT_S", "soon")
    with pytest.raises(ConfigError, match="CROSSDOCK_TIMEOUT_S"):
        Buffer()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_destroy_waits_for_a_call_of_another_thread(transport: str) -> None:
    def run(comm: Any) -> bool:
        buffer = make(comm, transport)
        if comm.Get_rank() == 1:
            time.sleep(0.5)
            return round_trip_is_right(buffer, 4)
        done: list[bool] = []
        call = threading.Thread(target=lambda: done.append(round_trip_is_right(buffer, 4)))
        call.start()
        time.sleep(0.1)
        call.join(10)
        buffer.destroy()
        with pytest.raises(TransportError, match="destroyed"):
            buffer.check()
        return done == [True]

    assert run_threads(2, run) == [True, True]


def test_what_a_destroyed_buffer_says() -> None:
    buffer = Buffer(transport="one_sided", num_nvl_bytes=1 << 16)
    with pytest.raises(ShapeError, match="offset"):
        buffer.get_local_buffer_tensor(torch.float32, offset=3)
    buffer.destroy()
    with pytest.raises(TransportError, match="destroyed"):
        buffer.get_local_buffer_tensor(torch.uint8)


def test_a_result_carries_only_its_own_bytes() -> None:
    buffer = Buffer(transport="one_sided")
    buffer.warmup(4096, 16, torch.float32)
    recv_x = dispatch(buffer, torch.ones(2, 16))[0]
    assert recv_x.untyped_storage().nbytes() < 1024


def test_a_handle_owns_its_tensors() -> None:
    buffer = Buffer(transport="loopback")
    in_rank = torch.ones(2, 1, dtype=torch.bool)
    per_expert = torch.ones(2, dtype=torch.int32)
    handle = buffer.dispatch(
        torch.ones(2, 4), is_token_in_rank=in_rank, num_tokens_per_expert=per_expert
    )[4]
    in_rank.zero_()
    assert handle.is_token_in_rank.all()


def test_a_copied_model_shares_the_buffer() -> None:
    buffer = Buffer(transport="loopback")
    assert copy.deepcopy({"buffer": buffer})["buffer"] is buffer


def test_an_expert_that_does_not_exist_is_refused() -> None:
    buffer = Buffer(transport="loopback")
    with pytest.raises(ShapeError, match="expert"):
        buffer.dispatch(
            torch.ones(1, 4),
            is_token_in_rank=torch.ones(1, 1, dtype=torch.bool),
            num_tokens_per_expert=torch.ones(2, dtype=torch.int32),
            topk_idx=torch.tensor([[2**32 + 1]]),
        )


def test_the_rank_that_waits_itself_is_not_the_one_that_is_missing() -> None:
    """Rank 2 goes between its signals: rank 0 gets on to the next call, rank 1 does not."""

    def run(comm: Any) -> BaseException | None:
        buffer = make(comm, "one_sided", timeout_s=1.0, first_call_timeout_s=4.0)
        recv_x, _, _, _, handle, _ = dispatch(buffer, rows(buffer, 4))
        if comm.Get_rank() == 2:
            control = buffer._session.transport._control
            signal = control.signal

            def signal_only_rank_0(kind: Any, call: Any, *, peer: int | None = None) -> None:
                if peer == 1:
                    raise SystemExit
                signal(kind, call, peer=peer)

            control.signal = signal_only_rank_0
            control.fail = lambda call, error: None
            try:
                buffer.combine(recv_x, handle)
            except SystemExit:
                time.sleep(6)
            return None
        return outcome(lambda: (buffer.combine(recv_x, handle), dispatch(buffer, rows(buffer, 4))))

    errors = run_threads(3, run)[:2]
    for error in errors:
        assert isinstance(error, PeerTimeoutError)
        assert error.missing == [2]
