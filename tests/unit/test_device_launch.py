"""What kernels are compiled for, and how they are launched: sizes, widths of numbers, halves."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl
from triton import knobs

from crossdock import formats
from crossdock.device.constants import aligned, constants, next_power_of_two, widest_word
from crossdock.device.launch import Kernel, model_of, starter
from crossdock.device.rank_kernels import back_row, is_few, rank_row, shares
from crossdock.device.streams import Branch
from crossdock.ops.triton import expert_records, expert_sums, rank_records, rank_routes
from crossdock.ops.triton.links import Address, Link

RECORDS = [
    Link,
    expert_records.Tokens,
    expert_records.Slabs,
    expert_records.Zone,
    expert_records.Call,
    expert_sums.Chosen,
    expert_sums.Returned,
    expert_sums.ReturnZone,
    expert_sums.ReturnCall,
    rank_records.Sent,
    rank_records.Received,
    rank_records.RowZone,
    rank_records.SentCall,
    rank_routes.Learned,
    rank_records.Rows,
    rank_records.Sums,
    rank_records.BackZone,
    rank_records.BackCall,
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_models_are_as_wide_as_what_they_stand_for_and_nothing_in_particular(
    record: type[tuple[int, ...]],
) -> None:
    """Triton compiles for the width of a number, and anew where it is 1 or a multiple of 16."""
    model = model_of(record)
    assert type(model) is record
    for name, number in zip(record.__annotations__, model, strict=True):
        is_wide = "Address" in str(record.__annotations__[name])
        assert (number >= 1 << 32) == is_wide, name
        assert number != 1
        assert number % 16


def test_numbers_of_another_kind_have_no_model() -> None:
    class Odd(NamedTuple):
        at: Address
        what: float

    with pytest.raises(KeyError):
        model_of(Odd)


def move_rows() -> None:
    """Stands for a kernel."""


@pytest.mark.parametrize(("hooked", "sizes"), [(False, [[7], [7]]), (True, [[3], [3, 4]])])
def test_a_launch_is_whole_or_in_halves(hooked: bool, sizes: list[list[int]]) -> None:
    kernel, arguments = Kernel(move_rows, num_warps=4), ((1, 2), (3,))
    launches = []
    kernel._start = lambda num, given, _: launches.append((num, given))
    receive = kernel.launch_halves((3, 4), arguments, hooked=hooked)
    for expected in sizes:
        assert launches == [(num, arguments) for num in expected]
        receive()


class Compiled:
    """Stands for what Triton has compiled: remembers how it was launched.

    Args:
        is_whole: whether it has all that it needs to be launched directly.
    """

    def __init__(self, *, is_whole: bool) -> None:
        self.launches: list[tuple[object, ...]] = []
        if is_whole:
            self.run = lambda *given: self.launches.append(("run", *given))
            self.function, self.packed_metadata = 17, (4, 1, 0)

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *given: self.launches.append((grid, *given))


class Driver:
    """Stands for Triton's: the current device is 2, and its current stream is 200."""

    def get_current_device(self) -> int:
        return 2

    def get_current_stream(self, device: int) -> int:
        return 100 * device


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossdock.device.launch.driver", SimpleNamespace(active=Driver()))


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("stream", "handle"), [(None, 200), (SimpleNamespace(cuda_stream=7), 7)], ids=["current", "own"]
)
def test_a_compiled_kernel_is_launched_directly(stream: Any, handle: int) -> None:
    compiled = Compiled(is_whole=True)
    starter(compiled, ("a", "b"))(5, ((1, 2), (3,)), stream)
    told = (17, (4, 1, 0), None, None, None)
    assert compiled.launches == [("run", 5, 1, 1, handle, *told, (1, 2), (3,), "a", "b")]


@pytest.mark.usefixtures("driver")
def test_what_cannot_be_launched_directly_is_left_to_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled, entered = Compiled(is_whole=False), []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(entered.append(stream)))
    stream = SimpleNamespace(cuda_stream=7)
    starter(compiled, ("a",))(5, ((1, 2),), stream)
    assert compiled.launches == [((5, 1, 1), (1, 2), "a")]
    assert entered == [stream]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_that_hook_into_triton_are_told(hook: str) -> None:
    compiled = Compiled(is_whole=True)
    start, hooks = starter(compiled, ()), getattr(knobs.runtime, hook)
    watch = print
    hooks.add(watch)
    try:
        start(5, ((1, 2),), None)
    finally:
        hooks.remove(watch)
    assert compiled.launches == [((5, 1, 1), (1, 2))]


@pytest.mark.parametrize(
    ("num_bytes", "word"), [(0, 16), (1, 1), (2, 2), (6, 2), (12, 4), (24, 8), (16, 16), (48, 16)]
)
def test_rows_move_in_the_widest_words_they_are_made_of(num_bytes: int, word: int) -> None:
    assert widest_word(num_bytes) == word


def test_powers_of_two() -> None:
    assert [next_power_of_two(number) for number in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def test_rows_are_copied_only_where_they_do_not_begin_on_16_bytes() -> None:
    rows = torch.arange(64, dtype=torch.float32).view(8, 8)
    assert aligned(rows).data_ptr() == rows.data_ptr()
    assert aligned(rows[2:]).data_ptr() == rows[2:].data_ptr()
    for part in (rows.t(), rows.flatten()[1:33].view(4, 8), rows[:, ::2]):
        copy = aligned(part)
        assert torch.equal(copy, part)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0


class Sizes(NamedTuple):
    """Constants of a kernel."""

    width: int
    name: str


def test_constants_are_constants_but_not_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    compiled = constants(Sizes(3, "a"))
    assert type(compiled) is Sizes
    assert all(isinstance(value, tl.constexpr) for value in compiled)
    assert [value.value for value in compiled] == [3, "a"]
    assert constants(Sizes(3, "a")) is compiled
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert constants(Sizes(4, "a")) == (4, "a")


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("num_sms", [1, 2, 4, 20, 24, 132])
def test_programs_are_shared_between_two_kinds_of_work(num_sms: int, back: bool) -> None:
    found = shares(num_sms, back=back)
    assert min(found) >= 1
    assert sum(found) == max(num_sms, 2)


@pytest.mark.parametrize(
    ("num_sms", "options", "wanted", "is_small"),
    [
        (24, {}, (10, 14), True),
        (24, {"back": True}, (12, 12), True),
        (128, {}, (32, 96), False),
        (128, {"back": True}, (64, 64), False),
        (128, {"senders": 8}, (8, 120), False),
    ],
)
def test_few_programs_have_large_chunks(
    num_sms: int, options: dict[str, Any], wanted: tuple[int, int], is_small: bool
) -> None:
    found = shares(num_sms, **options)
    assert found == wanted
    assert is_few(found) == is_small


def test_chunks_are_those_of_many_programs_or_of_few() -> None:
    form, common = formats.BF16.row(64), {"num_topk": 2, "has_weights": False, "local": 1}
    there = [rank_row(form, **common, few_programs=few).chunk for few in (False, True)]
    back = [
        back_row(torch.bfloat16, 64, num_topk=0, num_bias=0, num_ranks=2, few_programs=few).chunk
        for few in (False, True)
    ]
    assert (there, back) == ([16, 32], [4, 16])


def test_without_streams_there_is_one_line_of_work() -> None:
    with Branch(None) as branch:
        assert branch.begin() is None


class Stream:
    """Remembers whom it waited for, by events, which remember who recorded them last."""

    def __init__(self) -> None:
        self.awaited: list[Stream] = []

    def record_event(self, event: SimpleNamespace | None) -> SimpleNamespace:
        event = event or SimpleNamespace()
        event.recorder = self
        return event

    def wait_event(self, event: SimpleNamespace) -> None:
        self.awaited.append(event.recorder)


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_waits_for_the_second_line_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    stream = Stream()
    branch = Branch(stream)  # type: ignore[arg-type]
    for caller in (Stream(), Stream()):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda caller=caller: caller)
        with suppress(ValueError), branch:
            assert branch.begin() is stream
            assert stream.awaited.pop() is caller
            assert not caller.awaited
            if fails:
                raise ValueError
        assert caller.awaited == [stream]


def test_nobody_is_waited_for_where_nothing_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: caller)
    branch = Branch(Stream())  # type: ignore[arg-type]
    with branch:
        branch.begin()
    with branch:
        pass
    assert len(caller.awaited) == 1
